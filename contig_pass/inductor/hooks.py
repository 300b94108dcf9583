"""The private names of torch that contig_pass relies on, and what is lost without each.

torch promises none of them. Each is looked for before it is used; where a version lacks one, the
consequence is told in one line, once.
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch

from contig_pass.errors import InductorHookError

_logger = logging.getLogger("contig_pass")


@dataclass(frozen=True)
class Hook:
    """One private name.

    Attributes:
        module: where it lives.
        name: attribute, or attributes with dots, in that module.
        consequence: what does not work without it.
        required: nothing works without it.
        since, before: torch versions (major, minor) that have it; outside of them nothing is lost.
    """

    module: str
    name: str
    consequence: str
    required: bool = False
    since: tuple[int, int] = (2, 11)
    before: tuple[int, int] = (99, 0)

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    def find(self) -> Any | None:
        """What the name stands for in this torch; ``None`` if there is no such thing."""
        return self._look_up()[1]

    def exists(self) -> bool:
        """Whether this torch has the name, whatever its value."""
        return self._look_up()[0]

    def _look_up(self) -> tuple[bool, Any]:
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return False, None
        return True, found

    def expected(self) -> bool:
        """Whether this version of torch should have it."""
        major, minor = (int(part) for part in torch.__version__.split(".")[:2])
        return self.since <= (major, minor) < self.before

    def told(self) -> str:
        """The consequence of its absence in one line."""
        return f"torch {torch.__version__} has no {self.path}: {self.consequence}"


_I, _META = "torch._inductor", "torch._meta_registrations"
_REFUSED = "programs that torch refuses while tracing stay refused"

_NO_REALIGNING = "misaligned inputs cannot be realigned; use options={'inner': 'aot_eager'}"
COMPILED_GRAPH = Hook(
    f"{_I}.output_code", "CompiledFxGraph.__init__", _NO_REALIGNING, required=True
)
POST_COMPILE = Hook(
    f"{_I}.output_code", "CompiledFxGraph.post_compile", _NO_REALIGNING, required=True
)
LAYOUT_PASS = Hook(
    f"{_I}.config", "post_grad_custom_post_pass",
    "no graph can be repaired; use options={'inner': 'aot_eager'}", required=True,
)
EXACT_STRIDES = Hook(
    f"{_I}.ir", "ExternKernel.require_exact_strides",
    "no layout can be held; use options={'inner': 'aot_eager'}", required=True,
)
COPY_INPUT = Hook(
    f"{_I}.ir", "ExternKernel.copy_input",
    "no copy can be made; use options={'inner': 'aot_eager'}", required=True,
)
FOLDING_PASS = Hook(
    f"{_I}.config", "joint_custom_post_pass",
    "relayouts of frozen parameters are made on every call",
)
CURRENT_TRACE = Hook(
    "torch._dynamo.symbolic_convert", "InstructionTranslator.current_tx", _REFUSED
)
FAKE_CACHE = Hook(
    "torch._subclasses.fake_tensor", "FakeTensorMode._validate_cache_key", _REFUSED
)
SCALED_CHECK = Hook(_META, "_check_scaled_mm_sizes", _REFUSED)
SCALED_CHECK_V2 = Hook(_META, "_check_scaled_mm_sizes_v2", _REFUSED, before=(2, 14))
GROUPED_CHECK = Hook(_META, "_meta_grouped_mm_common", _REFUSED)
_BREAKS = "the graph breaks at torch.nn.functional.scaled_mm"
TRACE_RULES = Hook("torch._dynamo.trace_rules", "lookup", _BREAKS, before=(2, 13))
ENUM_HANDLERS = Hook(
    "torch._dynamo.variables.builder", "SourcelessBuilder._type_handlers", _BREAKS,
    since=(2, 12), before=(2, 13),
)
SCALED_LOWERING = Hook(
    f"{_I}.template_heuristics.triton", "BaseScaledMMConfigMixin.adjust_kernel_inputs",
    "an aligned slice as bias or scale may end a GPU compile with an AssertionError",
)
DATA_PTR = Hook(
    "torch._C._dynamo.guards", "_torchinductor_pyobject_tensor_data_ptr",
    "looking at a thousand inputs on a call takes up to 170 microseconds",
)
_KEPT = "results of opaque ops stay in memory until the graph returns"
FREEING = Hook(f"{_I}.codegen.wrapper", "PythonWrapperCodegen.codegen_free", _KEPT)
FREE_LINE = Hook(f"{_I}.codegen.wrapper", "FreeLine", _KEPT)
_UNSEEN = "the sanitizer does not see the ops that a custom op's kernel calls"
KEYS_OF = Hook("torch._C", "_dispatch_keys", _UNSEEN)
KEYS_AFTER = Hook("torch._C", "_dispatch_keyset_full_after", _UNSEEN)
CURRENT_MODE = Hook("torch.utils._python_dispatch", "_get_current_dispatch_mode", _UNSEEN)

HOOKS = (
    COMPILED_GRAPH, POST_COMPILE, LAYOUT_PASS, EXACT_STRIDES, COPY_INPUT, FOLDING_PASS,
    CURRENT_TRACE, FAKE_CACHE, SCALED_CHECK, SCALED_CHECK_V2, GROUPED_CHECK,
    TRACE_RULES, ENUM_HANDLERS, SCALED_LOWERING, DATA_PTR, FREEING, FREE_LINE,
    KEYS_OF, KEYS_AFTER, CURRENT_MODE,
)


def missing() -> tuple[Hook, ...]:
    """Hooks that this version of torch should have and has not."""
    return tuple(hook for hook in HOOKS if hook.expected() and not hook.exists())


@functools.cache
def self_test() -> None:
    """Look for every hook; once a process.

    Raises:
        InductorHookError: one is missing without which nothing works.
    """
    for hook in missing():
        if hook.required:
            raise InductorHookError(hook.told())
        _logger.warning("%s", hook.told())
