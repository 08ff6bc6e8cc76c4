"""Eight CPU devices and checked shapes, before anything imports JAX or the packages tested."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  flags = os.environ.get("XLA_FLAGS", "")
  if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

from jaxtyping import install_import_hook

install_import_hook(["ops", "lm_models"], "beartype.beartype")
