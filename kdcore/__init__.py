"""kdcore: distil language models and train speculative drafters from pluggable methods.

This package is the public API for programs, notebooks and plugins. It imports each name on first
access, so that ``import kdcore`` is fast. It contains no method and imports no plugin;
`kdcore.method.protocols` defines the interfaces of methods.
"""

from typing import TYPE_CHECKING

from kdcore.exports import on_access

__version__ = "0.1.0"

# by group, as docs/api.md documents them
__all__ = [  # noqa: RUF022
    # run a job
    "Plan",
    "Run",
    "UserError",
    "check",
    "evaluate",
    "read_spec",
    "report",
    "run",
    "table",
    # author a method
    "Component",
    "Params",
    "PositiveSchedule",
    "Schedule",
    "by_keywords",
    "hookimpl",
    "registry_with",
    # choose a component inside another's params
    "DivergenceChoice",
    "DrafterChoice",
    "EngineChoice",
    "GateChoice",
    "MatcherChoice",
    "MomentumChoice",
    "ScoreChoice",
    "SourceChoice",
    "SplitterChoice",
    "TreeChoice",
    "VerifierChoice",
    # records
    "Answered",
    "Batch",
    "DraftTree",
    "LogitBatch",
    "Part",
    "Row",
    "StateSizes",
    "TreeShape",
    "Verdict",
    # Protocols
    "AnswerScore",
    "BuildContext",
    "CompiledDrafter",
    "CompilingEngine",
    "DataSource",
    "Divergence",
    "Drafter",
    "Engine",
    "Gate",
    "KnowledgeSplitter",
    "Matcher",
    "MomentumPolicy",
    "RankedGate",
    "Stateful",
    "TrainedDrafter",
    "TreeBuilder",
    "TreeGrower",
    "Verifier",
    # inside a loop of one's own
    "DistillationLoss",
    "MomentumOptimizer",
    # models
    "LoadedModel",
    "load_drafter",
    "load_model",
    "speculative",
]

if TYPE_CHECKING:
    from kdcore.decoding.custom_generate import speculative
    from kdcore.errors import UserError
    from kdcore.library import (
        Plan,
        check,
        evaluate,
        load_drafter,
        load_model,
        read_spec,
        report,
        run,
        table,
    )
    from kdcore.method.choice import (
        DivergenceChoice,
        DrafterChoice,
        EngineChoice,
        GateChoice,
        MatcherChoice,
        MomentumChoice,
        ScoreChoice,
        SourceChoice,
        SplitterChoice,
        TreeChoice,
        VerifierChoice,
    )
    from kdcore.method.construction import by_keywords
    from kdcore.method.hookspecs import Component, hookimpl
    from kdcore.method.params import Params
    from kdcore.method.protocols import (
        AnswerScore,
        BuildContext,
        CompiledDrafter,
        CompilingEngine,
        DataSource,
        Divergence,
        Drafter,
        Engine,
        Gate,
        KnowledgeSplitter,
        Matcher,
        MomentumPolicy,
        RankedGate,
        Stateful,
        TrainedDrafter,
        TreeBuilder,
        TreeGrower,
        Verifier,
    )
    from kdcore.method.records import (
        Answered,
        Batch,
        DraftTree,
        LogitBatch,
        Part,
        Row,
        StateSizes,
        TreeShape,
        Verdict,
    )
    from kdcore.method.registry import registry_with
    from kdcore.method.schedule import PositiveSchedule, Schedule
    from kdcore.models.loaded import LoadedModel
    from kdcore.runs.folder import Run
    from kdcore.training.loss import DistillationLoss
    from kdcore.training.momentum_optimizer import MomentumOptimizer
else:
    # the same names as in the imports for type checkers above; a test compares the two
    _MODULES = {
        "kdcore.decoding.custom_generate": "speculative",
        "kdcore.errors": "UserError",
        "kdcore.library": "Plan check evaluate load_drafter load_model read_spec report run table",
        "kdcore.method.choice": "DivergenceChoice DrafterChoice EngineChoice GateChoice "
        "MatcherChoice MomentumChoice ScoreChoice SourceChoice SplitterChoice TreeChoice "
        "VerifierChoice",
        "kdcore.method.construction": "by_keywords",
        "kdcore.method.hookspecs": "Component hookimpl",
        "kdcore.method.params": "Params",
        "kdcore.method.protocols": "AnswerScore BuildContext CompiledDrafter CompilingEngine "
        "DataSource Divergence Drafter Engine Gate KnowledgeSplitter Matcher MomentumPolicy "
        "RankedGate Stateful TrainedDrafter TreeBuilder TreeGrower Verifier",
        "kdcore.method.records": "Answered Batch DraftTree LogitBatch Part Row StateSizes "
        "TreeShape Verdict",
        "kdcore.method.registry": "registry_with",
        "kdcore.method.schedule": "PositiveSchedule Schedule",
        "kdcore.models.loaded": "LoadedModel",
        "kdcore.runs.folder": "Run",
        "kdcore.training.loss": "DistillationLoss",
        "kdcore.training.momentum_optimizer": "MomentumOptimizer",
    }
    __getattr__, __dir__ = on_access(__name__, _MODULES)
