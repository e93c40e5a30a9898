"""The stages of a run's configuration: one frozen dataclass each, checked when it is made.

``rlkit.config`` joins them to a RunConfig; leaf names are unique over all stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlkit.checks import check_types, require

LossType = Literal["grpo", "dr_grpo", "dapo"]
Advantage = Literal["group_std", "group_mean", "batch_std", "rloo", "reinforce_pp"]
KlSchedule = Literal["fixed", "linear", "cosine", "adaptive"]
KlEstimator = Literal["k3", "k3_corrected"]


@dataclass(frozen=True)
class ModelConfig:
    """Which policy, and what of it is trained."""

    model: str = "tiny-base"
    """A name in data/models, ``run:<name>`` (a finished run), a folder, or a hub name."""
    model_revision: str = "main"
    """Hub revision; the resolved commit is recorded in env.json. Ignored for folders."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of forward passes. Master weights are float32 in full training either way."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers; 0 trains every weight."""
    lora_alpha: float = 32.0
    """LoRA scale numerator (scale = alpha / rank); > 0."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 30 % more time."""

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.model), "model", self.model, "a model name or folder")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "an integer >= 0")
        require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "a number > 0")


@dataclass(frozen=True)
class TaskConfig:
    """Which problems, and how they become prompts."""

    task: str = "chain"
    """``chain``, ``edge``, ``large``, a .jsonl/.parquet file, or a hub data set by name; several
    joined by ``+`` are mixed in equal parts."""
    task_revision: str = "main"
    """Hub revision of the data set; ignored for embedded tasks and files."""
    template: str = "question"
    """Prompt template: ``question``, ``boxed``, ``zero_short``, ``zero_long``, ``code``."""
    train_problems: int = 4096
    """Problems in the training pool; >= 1. Embedded tasks draw them from a seeded index range."""
    documents: str = ""
    """SFT only: JSONL file with ``prompt`` (messages) and ``completion`` (text) per row, and
    ``outputs`` (character ranges) where a tool wrote."""

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.task), "task", self.task, "a task name or file")
        require(self.train_problems >= 1, "train_problems", self.train_problems, "an integer >= 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How rollouts are drawn during training and sampled evaluation."""

    temperature: float = 1.0
    """Softmax temperature of rollouts; > 0. The study recommends 1.2 (section 3.1.1)."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]. Below 1 the scored policy differs from the sampled one."""
    max_completion_length: int = 128
    """Token budget of a response; >= 1. Responses that hit it count as truncated."""
    engine: Literal["rlkit", "vllm"] = "rlkit"
    """What draws training rollouts. ``vllm`` needs a GPU and the packages of ``.[gpu]``; its
    log-probabilities differ from the trainer's, which is corrected and logged."""
    vllm_memory: float = 0.3
    """Share of GPU memory for vLLM's weights and cache, in (0, 1)."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "a number > 0",
            "Greedy decoding is an evaluation mode, not a rollout temperature.",
        )
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        require(0 < self.vllm_memory < 1, "vllm_memory", self.vllm_memory, "a number in (0, 1)")
        require(
            self.max_completion_length >= 1,
            "max_completion_length",
            self.max_completion_length,
            "an integer >= 1",
        )


@dataclass(frozen=True)
class RewardConfig:
    """What a rollout is worth, and which rollouts are trained on."""

    reward: Literal[
        "accuracy", "graded", "cosine", "rrl", "rra",
        "format", "random", "inverted", "majority", "any_box",
    ] = "accuracy"  # fmt: skip
    """``accuracy``: 1 if right and ended, gated by the format rule. ``graded``: right 1, wrong -1,
    unboxed -2 (STILL-3-1.5B); ``cosine``: right answers better short, wrong ones better long. The
    study's length rewards: ``rrl`` adds the relative length, ``rra`` the reflection words. Wrong on
    purpose: ``format``: 1 if well formed; ``random``: a fair coin (null test); ``inverted``: 1 for
    a wrong answer in good form; ``majority``: 1 for the group's most frequent answer; ``any_box``:
    1 if any box holds the gold answer. Formulas: docs/rewards.md."""
    format: Literal["boxed", "zero", "none"] = "boxed"
    """Format gate on accuracy: ``boxed`` (embedded default), ``zero`` (the study's five
    conditions), ``none``."""
    false_positive: float = 0.0
    """``accuracy`` only: share of wrong answers in good form that the verifier accepts; [0, 1]."""
    false_negative: float = 0.0
    """``accuracy`` only: share of right answers in good form that it rejects; [0, 1]."""
    verifier_noise: Literal["independent", "structured"] = "independent"
    """Whether each judgement errs on its own, or the error is a function of the answer."""
    overlong_weight: float = 0.0
    """Weight of DAPO's soft overlong punishment (-1 to 0) in the sum, in [0, 1)."""
    overlong_cache: int = 16
    """Tokens before ``max_completion_length`` over which that punishment grows; >= 1."""
    repetition_weight: float = 0.0
    """Weight of the repetition penalty (-1 to 0) in the sum, in [0, 1)."""
    repetition_ngram: int = 20
    """Tokens that must repeat to be punished; >= 1."""
    tool_use_weight: float = 0.0
    """Weight of the bonus for working code in right answers (0 to 1) in the sum, in [0, 1)."""
    failing_code_weight: float = 0.0
    """Weight of the penalty for a response with failing code (-1 or 0) in the sum, in [0, 1)."""
    call_cost_weight: float = 0.0
    """Weight of the price of calls in right answers (-1 to 0) in the sum, in [0, 1): a quarter of
    it per call, up to four."""
    group_filter: Literal["none", "qs", "rs", "orm"] = "none"
    """What is dropped from baseline and loss. The study's length rules: ``qs`` keeps questions
    whose right answers are longer; ``rs`` keeps the longest right and the shortest wrong answer;
    ``orm`` drops truncated responses."""
    allow_exploitable: bool = False
    """Run although the self-check found a wrong answer that scores; shown on every figure."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.reward == "accuracy" or self.allow_exploitable,
            "reward",
            self.reward,
            "'accuracy' unless allow_exploitable is true",
            "A reward that pays wrong answers needs allow_exploitable=True.",
        )
        for name in ("overlong", "repetition", "tool_use", "failing_code", "call_cost"):
            weight = getattr(self, f"{name}_weight")
            require(
                0 <= weight < 1,
                f"{name}_weight",
                weight,
                "a weight in [0, 1)",
                "From 1 on, a right answer could earn no more than a wrong one.",
            )
        names = [f"{n}_weight" for n in ("overlong", "repetition", "failing_code", "call_cost")]
        punished = sum(getattr(self, name) for name in names)
        require(
            punished < 1,
            " + ".join(names),
            punished,
            "a sum below 1",
            "Else a right answer with every penalty could earn no more than a wrong one with none.",
        )
        for name in ("overlong_cache", "repetition_ngram"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        for name in ("false_positive", "false_negative"):
            rate = getattr(self, name)
            require(0 <= rate <= 1, name, rate, "a share in [0, 1]")
            require(
                rate == 0 or self.reward == "accuracy",
                name,
                rate,
                f"0 with reward={self.reward!r}",
                "Only the verifier behind reward='accuracy' can be made to err.",
            )
            require(
                rate == 0 or self.allow_exploitable,
                name,
                rate,
                "0 unless allow_exploitable is true",
                "A verifier that errs on purpose needs allow_exploitable=True.",
            )


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. Counts of completions, not of prompts, unless said."""

    steps: int = 60
    """Optimizer windows, each with fresh rollouts; >= 1."""
    batch_size: int = 128
    """Completions per step; divisible by rollouts."""
    rollouts: int = 16
    """Completions per prompt (group size G); >= 2."""
    micro_batch_size: int = 128
    """Completions per forward/backward pass; divides batch_size / updates_per_batch."""
    updates_per_batch: int = 1
    """Optimizer updates per rollout batch; 1 is on-policy."""
    learning_rate: float = 3e-4
    """Peak AdamW rate; > 0. About 3e-4 below 1M parameters, 1e-6 for 1B and more."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape from the peak down to 0 at the last step (constant: no decay)."""
    warmup_steps: int = 0
    """Linear warm-up from 0, in optimizer updates; >= 0."""
    weight_decay: float = 0.0
    """AdamW decay; >= 0."""
    max_grad_norm: float = 1.0
    """Gradient norm clip; > 0."""
    loss_type: LossType = "dapo"
    """Aggregation: ``grpo`` mean per sequence, ``dr_grpo`` fixed divisor, ``dapo`` token mean."""
    advantage: Advantage = "group_mean"
    """``group_std`` (GRPO z-score), ``group_mean`` (Dr. GRPO), ``batch_std`` (group mean, batch
    std), ``rloo`` (leave-one-out baseline), ``reinforce_pp`` (group mean, then batch z-score)."""
    beta: float = 0.0
    """KL coefficient at the start, added to the loss once; >= 0. 0 loads no reference model."""
    kl_schedule: KlSchedule = "fixed"
    """How beta moves: ``fixed``; ``linear`` and ``cosine`` down to 0 at the last step (cosine is
    the study's annealing, half at the middle); ``adaptive`` holds the KL at ``kl_target``."""
    kl_estimator: KlEstimator = "k3"
    """``k3``: the study's plain term, whose gradient is that of the forward KL. ``k3_corrected``:
    times the policy ratio, an unbiased gradient of the reverse KL (2512.02556)."""
    kl_target: float = 0.01
    """``adaptive`` only: KL to the reference to hold, nats per token; > 0."""
    kl_gain: float = 0.1
    """``adaptive`` only: largest relative change of beta per step is 0.2 times this; in (0, 5)."""
    reference_reset: int = 0
    """Steps between replacements of the reference by the policy of that moment; 0 keeps the start.
    The study's 1.5B recipe: every 60."""
    epsilon: float = 0.2
    """Lower clip range of the ratio, in (0, 1)."""
    epsilon_high: float = 0.2
    """Upper clip range, > 0; 0.28 is DAPO's clip-higher."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus; >= 0."""
    mask_truncated: bool = False
    """Leave truncated completions out of the loss (DAPO overlong filtering)."""
    drop_no_signal: bool = True
    """Skip forward and backward of rows with advantage 0, where that changes no gradient (no KL,
    no entropy bonus)."""
    refill_rounds: int = 0
    """Dynamic sampling (DAPO): rounds, at most, in which groups without reward variance are
    replaced by groups of other problems; 0 keeps every group."""
    epochs: int = 1
    """SFT only: passes over the documents; >= 1."""
    save_every: int = 0
    """Steps between checkpoints of the weights that are kept; 0 keeps only the final ones."""
    resume_every: int = 10
    """Steps between resume points (weights, optimizer, random state); the newest is kept until the
    run is done. 0 writes none: an interrupted run starts again."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "micro_batch_size", "updates_per_batch", "epochs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(self.rollouts >= 2, "rollouts", self.rollouts, "an integer >= 2 (a group)")
        require(
            self.batch_size % self.rollouts == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of rollouts={self.rollouts}",
            f"Use {max(1, round(self.batch_size / self.rollouts)) * self.rollouts}.",
        )
        per_update, rest = divmod(self.batch_size, self.updates_per_batch)
        require(
            rest == 0 and per_update % self.micro_batch_size == 0,
            "micro_batch_size",
            self.micro_batch_size,
            f"a divisor of batch_size / updates_per_batch = "
            f"{self.batch_size}/{self.updates_per_batch}",
        )
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number > 0")
        for name in (
            "warmup_steps", "weight_decay", "beta", "entropy_coef", "save_every", "resume_every",
            "reference_reset", "refill_rounds",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        require(self.kl_target > 0, "kl_target", self.kl_target, "a number > 0")
        # From 5 on, the first step without a divergence would bring beta to 0 or below, for good.
        require(0 < self.kl_gain < 5, "kl_gain", self.kl_gain, "a number in (0, 5)")
        for name, neutral in (("kl_schedule", "fixed"), ("reference_reset", 0)):
            require(
                self.beta > 0 or getattr(self, name) == neutral,
                name,
                getattr(self, name),
                f"{neutral!r} while beta=0",
                "Without a KL term there is no reference: set beta > 0.",
            )
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "a number > 0")
        require(0 < self.epsilon < 1, "epsilon", self.epsilon, "a number in (0, 1)")
        require(self.epsilon_high > 0, "epsilon_high", self.epsilon_high, "a number > 0")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training. Always on validation problems; test is for the notebooks."""

    eval_every: int = 0
    """Steps between evaluations; 0 evaluates never during training."""
    eval_problems: int = 128
    """Validation problems per evaluation; >= 1."""
    eval_samples: int = 4
    """Samples per problem of the sampled evaluation; >= 1."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.eval_every >= 0, "eval_every", self.eval_every, "an integer >= 0")
        require(self.eval_problems >= 1, "eval_problems", self.eval_problems, "an integer >= 1")
        require(self.eval_samples >= 1, "eval_samples", self.eval_samples, "an integer >= 1")
