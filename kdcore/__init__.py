"""kdcore: distil language models and train speculative drafters from pluggable methods.

This package is the public API for programs, notebooks and plugins. It imports each name on first
access, so that ``import kdcore`` is fast. It contains no method and imports no plugin;
`kdcore.method.protocols` and `kdcore.decoding.protocols` define the interfaces of methods.
"""

from typing import TYPE_CHECKING

from kdcore.components.exports import on_access

__version__ = "0.1.0"

# by group, as docs/reference/api.md documents them
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
    "Job",
    "Params",
    "PositiveSchedule",
    "Schedule",
    "by_keywords",
    "hookimpl",
    "registry_with",
    # choose a component inside another's params
    "AdvantageChoice",
    "BaselineChoice",
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
    "DecodedBatch",
    "DecodingSettings",
    "DraftTree",
    "LogitBatch",
    "Part",
    "Row",
    "SampledTokens",
    "StateSizes",
    "TreeShape",
    "Verdict",
    # Protocols
    "Advantage",
    "AnswerScore",
    "Baseline",
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
    from kdcore.components.choice import (
        AdvantageChoice,
        BaselineChoice,
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
    from kdcore.components.component import Component, Params
    from kdcore.components.construction import BuildContext, by_keywords
    from kdcore.components.hookspecs import hookimpl
    from kdcore.components.job import Job
    from kdcore.components.registry import registry_with
    from kdcore.data.responses.score import Answered, AnswerScore
    from kdcore.data.source import DataSource
    from kdcore.decoding.baseline import Baseline, DecodedBatch, DecodingSettings
    from kdcore.decoding.custom_generate import speculative
    from kdcore.decoding.engines.protocols import CompilingEngine, Engine
    from kdcore.decoding.protocols import (
        CompiledDrafter,
        Drafter,
        TrainedDrafter,
        TreeBuilder,
        TreeGrower,
        Verifier,
    )
    from kdcore.decoding.tree import DraftTree, TreeShape, Verdict
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
    from kdcore.method.protocols import (
        Advantage,
        Divergence,
        Gate,
        KnowledgeSplitter,
        Matcher,
        MomentumPolicy,
        RankedGate,
        Stateful,
    )
    from kdcore.method.records import Batch, LogitBatch, Part, Row, SampledTokens, StateSizes
    from kdcore.models.loading.loaded import LoadedModel
    from kdcore.runs.folder import Run
    from kdcore.specs.parts.schedule import PositiveSchedule, Schedule
    from kdcore.training.loss import DistillationLoss
    from kdcore.training.momentum_optimizer import MomentumOptimizer
else:
    # the same names as in the imports for type checkers above; a test compares the two
    _MODULES = {
        "kdcore.components.choice": "AdvantageChoice BaselineChoice DivergenceChoice DrafterChoice "
        "EngineChoice GateChoice MatcherChoice MomentumChoice ScoreChoice SourceChoice "
        "SplitterChoice TreeChoice VerifierChoice",
        "kdcore.components.component": "Component Params",
        "kdcore.components.construction": "BuildContext by_keywords",
        "kdcore.components.hookspecs": "hookimpl",
        "kdcore.components.job": "Job",
        "kdcore.components.registry": "registry_with",
        "kdcore.data.responses.score": "Answered AnswerScore",
        "kdcore.data.source": "DataSource",
        "kdcore.decoding.baseline": "Baseline DecodedBatch DecodingSettings",
        "kdcore.decoding.custom_generate": "speculative",
        "kdcore.decoding.engines.protocols": "CompilingEngine Engine",
        "kdcore.decoding.protocols": "CompiledDrafter Drafter TrainedDrafter TreeBuilder "
        "TreeGrower Verifier",
        "kdcore.decoding.tree": "DraftTree TreeShape Verdict",
        "kdcore.errors": "UserError",
        "kdcore.library": "Plan check evaluate load_drafter load_model read_spec report run table",
        "kdcore.method.protocols": "Advantage Divergence Gate KnowledgeSplitter Matcher "
        "MomentumPolicy RankedGate Stateful",
        "kdcore.method.records": "Batch LogitBatch Part Row SampledTokens StateSizes",
        "kdcore.models.loading.loaded": "LoadedModel",
        "kdcore.runs.folder": "Run",
        "kdcore.specs.parts.schedule": "PositiveSchedule Schedule",
        "kdcore.training.loss": "DistillationLoss",
        "kdcore.training.momentum_optimizer": "MomentumOptimizer",
    }
    __getattr__, __dir__ = on_access(__name__, _MODULES)
