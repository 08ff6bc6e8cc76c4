"""What `--help` prints: the fields of a config, with the comments of the files that define them.

A config is a program, so its comments are found by reading its source: the comment behind an
assignment to a field (and the lines that continue it at the same column), else the comment lines
directly above it. Understood are

    config.optim.lr = 1e-3  # unit
    config.optim = optim = ConfigDict(); optim.lr = 1e-3  # unit
    config.optim = ConfigDict(dict(lr=1e-3,  # unit
    config.optim = make_optim()        # whose body does any of the above
"""

import ast
import dataclasses
import io
import itertools
import pathlib
import shutil
import textwrap
import tokenize
import types
from collections.abc import Iterator, Sequence

import ml_collections

USAGE = (
  "python run.py --config=configs/X.py[:arg] [--workdir=runs/X]\n"
  "              [--mode=train|eval|sample|aot|bench|doctor] [--config.group.field=value ...]\n"
  "              with --mode=aot: --topology=v5e:16x16 [--largest_batch] [--json=aot.json]\n"
  "              with --mode=doctor: [--op=gla,kda] [--json=doctor.json]\n"
  "              one of N processes: --coordinator=host:port --processes=N --process=i"
)
VALUE_WIDTH = 24


def usage(configs: Sequence[str]) -> str:
  """The help without a config: how to call the program, and which configs there are."""
  lines = [USAGE, "", "Configs:", *(f"  {name}" for name in configs)]
  return "\n".join([*lines, "", "--config=... --help lists the fields of a config."])


def describe(config: ml_collections.ConfigDict, module: types.ModuleType, config_file: str) -> str:
  """The help with a config: every field with its type, its value and its comment.

  Args:
    config: The config, overrides applied.
    module: The module that made it; its source and that of the configs it imports are read.
    config_file: How the user calls it.

  Returns:
    Lines as wide as the terminal, in the order in which the source defines the fields.
  """
  notes: dict[str, str] = {}
  for source in _sources(module):
    for name, comment in field_comments(source).items():
      notes[name] = notes.get(name) or comment
  order = {name: place for place, name in enumerate(notes)}
  rows = sorted(_rows(config), key=lambda row: order.get(row[0], len(order)))
  groups: dict[str, list] = {}
  for row in rows:
    groups.setdefault(row[0].rpartition(".")[0], []).append(row)
  name_width = max((len(row[0]) for row in rows), default=0)
  kind_width = max((len(row[1]) for row in rows), default=0)
  lines = [USAGE, ""]
  if module.__doc__:
    lines += [*module.__doc__.strip().splitlines(), ""]
  lines.append(
    f"Fields of {config_file}: name, type, value, meaning. Set one by --config.NAME=VALUE"
  )
  column = name_width + kind_width + VALUE_WIDTH + 8
  width = max(28, shutil.get_terminal_size((120, 24)).columns - column)
  for members in groups.values():
    lines.append("")
    for name, kind, value in members:
      head = f"  {name:<{name_width}}  {kind:<{kind_width}}  {value:<{VALUE_WIDTH}}  "
      first, *rest = textwrap.wrap(notes.get(name, ""), width) or [""]
      if len(head) > column:
        lines += [head, " " * column + first]
      else:
        lines.append(head + first)
      lines += [" " * column + line for line in rest]
  return "\n".join(line.rstrip() for line in lines)


def field_comments(source: str) -> dict[str, str]:
  """Dotted field -> comment, for the fields that a config's source assigns, in their order there.

  A field without a comment is listed with an empty one. Where a field is assigned twice, the first
  comment counts: what follows are special cases.
  """
  tree = ast.parse(source)
  functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
  reader = _Reader(functions, _Comments.of(source))
  if "get_config" in functions:
    reader.function(functions["get_config"], "")
  return reader.found


def _sources(module: types.ModuleType) -> Iterator[str]:
  """The sources of the configs that a config imports, most basic first, and then its own."""
  for value in list(vars(module).values()):
    if isinstance(value, types.ModuleType) and hasattr(value, "get_config"):
      yield from _sources(value)
  yield pathlib.Path(module.__file__).read_text()


def _rows(config, prefix="") -> Iterator[tuple[str, str, str]]:
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _rows(value, f"{prefix}{name}.")
    else:
      kind = config.get_type(name).__name__.replace("NoneType", "any")
      yield prefix + name, kind, repr(value)


@dataclasses.dataclass
class _Comments:
  """The comments of a source, by line.

  Attributes:
    code: Lines that hold code.
    text: Line -> (column of the hash, words).
  """

  code: set[int]
  text: dict[int, tuple[int, str]]

  @classmethod
  def of(cls, source: str) -> "_Comments":
    code, text = set(), {}
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
      line, column = token.start
      if token.type == tokenize.COMMENT:
        text[line] = (column, token.string.lstrip("#").strip())
      elif token.type not in layout:
        code.update(range(line, token.end[0] + 1))
    return cls(code, text)

  def about(self, node: ast.AST) -> str:
    """The comment behind a node that starts a line, else the lines directly above it."""
    for line in range(node.lineno, node.end_lineno + 1):
      if line in self.text and line in self.code:
        column, words = self.text[line]
        return " ".join([words, *self._block(itertools.count(line + 1), column)])
    above = list(self._block(itertools.count(node.lineno - 1, -1), node.col_offset))
    return " ".join(reversed(above))

  def _block(self, lines: Iterator[int], column: int) -> Iterator[str]:
    for line in lines:
      if line in self.code or self.text.get(line, (-1, ""))[0] != column:
        return
      yield self.text[line][1]


class _Reader:
  """Follows a config's assignments and notes the comment of each field."""

  def __init__(self, functions: dict[str, ast.FunctionDef], comments: _Comments):
    self.functions = functions
    self.comments = comments
    self.found: dict[str, str] = {}
    self.entered: list[str] = []

  def function(self, node: ast.FunctionDef, prefix: str) -> None:
    """Reads a function whose result becomes the group `prefix`."""
    if node.name in self.entered:
      return
    self.entered.append(node.name)
    groups: dict[str, str] = {}
    for statement in _statements(node):
      if isinstance(statement, ast.Assign):
        self.assignment(statement, prefix, groups)
      elif isinstance(statement, ast.Return):
        self.value(statement.value, prefix)
    self.entered.pop()

  def assignment(self, node: ast.Assign, prefix: str, groups: dict[str, str]) -> None:
    """Reads one assignment; `groups` maps local variables to the groups that they name."""
    fields = [
      _field(target, groups) for target in node.targets if isinstance(target, ast.Attribute)
    ]
    fields = [name for name in fields if name is not None]
    place = fields[0] if fields else _field(node.value, groups)
    for target in node.targets:
      if isinstance(target, ast.Name):
        if place is not None:
          groups[target.id] = place
        elif isinstance(node.value, ast.Call) and _called(node.value) in (
          "ConfigDict",
          "get_config",
        ):
          groups[target.id] = prefix
          self.value(node.value, prefix)
    for name in fields:
      if not self.value(node.value, name):
        self.found[name] = self.found.get(name) or self.comments.about(node)

  def value(self, node: ast.AST | None, name: str) -> bool:
    """Reads an expression that becomes `name`; returns whether it is a group of fields."""
    if not isinstance(node, ast.Call):
      return False
    if _called(node) in self.functions:
      self.function(self.functions[_called(node)], name)
      return True
    if _called(node) != "ConfigDict":
      return False
    for member in itertools.chain(node.args, [node]):
      pairs = []
      if isinstance(member, ast.Call):
        pairs = [
          (keyword.arg, keyword, keyword.value) for keyword in member.keywords if keyword.arg
        ]
      elif isinstance(member, ast.Dict):
        pairs = [
          (key.value, ast.copy_location(ast.Dict(), key), value)
          for key, value in zip(member.keys, member.values)
          if isinstance(key, ast.Constant)
        ]
      for leaf, place, value in pairs:
        full = f"{name}.{leaf}" if name else leaf
        place.end_lineno = value.end_lineno
        if not self.value(value, full):
          self.found[full] = self.found.get(full) or self.comments.about(place)
    return True


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
  """The statements of a function in their order, those of its branches included."""
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.stmt) and not isinstance(child, ast.FunctionDef | ast.ClassDef):
      yield child
      yield from _statements(child)


def _called(node: ast.Call) -> str:
  function = node.func
  return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _field(node: ast.AST, groups: dict[str, str]) -> str | None:
  """The dotted field that `variable.a.b` names, None where the variable is no group."""
  path = []
  while isinstance(node, ast.Attribute):
    path.append(node.attr)
    node = node.value
  if not isinstance(node, ast.Name) or node.id not in groups:
    return None
  return ".".join(part for part in [groups[node.id], *reversed(path)] if part)
