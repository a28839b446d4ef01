"""Makes `AutoModelForCausalLM` know mixtures after `import memlm`, which itself imports nothing heavy."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_AWAITED = "transformers.models.auto.modeling_auto"


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Lets transformers' table of models be imported as ever, and adds mixtures to it then."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            run = loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Make transformers know the config of a mixture, and what loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from memlm.mix.config import MixedLMConfig

    class Loader:
        """Stands for `MixedLM` in transformers' table of models until that is imported, which takes its time."""

        config_class = MixedLMConfig

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            from memlm.mix.mixed_lm import MixedLM

            return MixedLM.from_pretrained(*args, **kwargs)

    AutoConfig.register(MixedLMConfig.model_type, MixedLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(MixedLMConfig, Loader, exist_ok=True)  # type: ignore[arg-type]


def register_with_transformers() -> None:
    """Register the kind of model that `MixedLM.save_pretrained` writes, now or once transformers is imported."""
    if _AWAITED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTransformers())
