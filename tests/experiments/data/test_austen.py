import pytest

from experiments.data import austen, datasets

SPLITS = {
  "train": ["emma", "mansfieldpark", "sensesensibility", "northangerabbey"],
  "validation": ["persuasion"],
  "test": ["prideprejudice"],
}
CHAPTERS = {
  "emma": 55,
  "mansfieldpark": 48,
  "sensesensibility": 50,
  "northangerabbey": 31,
  "persuasion": 24,
  "prideprejudice": 61,
}
BYTES = {"train": 2_873_403, "validation": 466_853, "test": 684_767}


@pytest.mark.parametrize("config", ["chapters", "novels"])
def test_documents_joined_are_the_novels_byte_for_byte(make_config, config):
  for split, novels in SPLITS.items():
    texts, _ = datasets.open_texts(make_config(name=f"austen/{config}"), split)
    assert len(texts) == (sum(map(CHAPTERS.get, novels)) if config == "chapters" else len(novels))
    joined = b"".join(texts[i] for i in range(len(texts)))
    assert joined == b"".join(map(austen.novel_text, novels))
    assert len(joined) == BYTES[split]


def test_every_chapter_but_the_first_opens_with_its_heading():
  for novel, count in CHAPTERS.items():
    chapters = austen.split_chapters(austen.novel_text(novel))
    assert len(chapters) == count
    for number, chapter in enumerate(chapters, start=1):
      first, second = chapter.split(maxsplit=2)[:2]
      assert number == 1 or first.upper() in (b"CHAPTER", b"VOLUME"), (novel, number, first, second)
  emma = austen.split_chapters(austen.novel_text("emma"))
  assert emma[18].startswith(b"VOLUME II\n") and b"CHAPTER I\n" in emma[18]


def test_titles_and_chapters_are_told(make_config):
  datasets.open_texts(make_config(), "test")
  builder = austen.Austen(config="chapters", data_dir=f"{make_config().cache_directory}/datasets")
  records = list(builder.as_data_source("test"))
  assert [record["chapter"] for record in records] == list(range(1, 62))
  assert {record["title"] for record in records} == {b"Pride and Prejudice"}
