"""Loads models for generation or scoring, from the output of a training step or any other model directory.

Weights are read from safetensors, or from PyTorch's own files by a reader that admits tensors only. No code in a
model's directory runs, unless --trust_remote_code allows it.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.artifacts.compatibility import trained_codec
from common.data.errors import TemplateError
from common.data.options import naming_flags
from common.data.templates import TEMPLATE_NAMES
from common.data.tokenization import Codec, load_tokenizer, make_codec, published_ends
from common.errors import InputError, ModelError, named_by
from common.models.checks import check_finite
from common.models.configuration import (
    check_language_model,
    check_vocabulary,
    explained,
    gives_scores,
    max_positions,
)
from common.models.encoder_decoder import reads_source
from common.models.loading import load_causal_lm, load_scoring_model
from common.models.scalar import ScoringModel, scoring_model
from common.paths import writing_to
from common.training.engine import DTYPES, resolve_dtype
from inference.locating import ModelFiles, find_model
from inference.options import LoadOptions

_DEFAULT_TEMPLATE = "human_assistant"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device.

    Attributes:
        model: a causal language model of transformers, or a `ScoringModel`.
        codec: how text becomes ids, as in the model's training.
        device: where the weights are.
        positions: tokens that the model can read at once; None: any number.
    """

    model: Any
    codec: Codec
    device: torch.device
    positions: int | None

    def max_prompt_tokens(self, max_new_tokens: int) -> int | None:
        """Tokens of the longest prompt if so many tokens are to follow; None if there is no limit.

        Raises:
            InputError: no prompt at all would fit.
        """
        if self.positions is None:
            return None
        max_prompt_tokens = self.positions - max_new_tokens
        if max_prompt_tokens < self.codec.shortest_prompt:
            raise InputError(
                str(max_new_tokens), f"it leaves no room for a question: the model has {self.positions} positions"
            )
        return max_prompt_tokens


def load_actor(path: str, options: LoadOptions) -> LoadedModel:
    """A language model that responds to prompts; an adapter is merged with its base model.

    Raises:
        ModelError: there is no such model, it cannot be loaded, or it is a reward model or an encoder.
        UserError: an option does not suit the model or the machine.
    """
    files, is_reward_model = _find(path, options)
    if is_reward_model:
        raise ModelError(
            path,
            "it is a reward model, which gives scores and no answers: name a language model, such as the output of "
            "step1_sft/main.py or step3_ppo/main.py",
        )
    with files.loading_weights():
        check_language_model(files.weights, options.trust_remote_code)
    return _load(files, options)


def load_reward_model(path: str, options: LoadOptions) -> LoadedModel:
    """A reward model as a `ScoringModel` that gives raw scores.

    Raises:
        ModelError: there is no such model, it cannot be loaded, or it is no reward model.
        UserError: an option does not suit the model or the machine.
    """
    files, is_reward_model = _find(path, options)
    if not is_reward_model:
        raise ModelError(
            path, "it is no reward model: it has no trained score head; make one with step2_reward/main.py"
        )
    return _load(files, options)


def load_merged(files: ModelFiles, codec: Codec, trust_remote_code: bool, dtype: torch.dtype) -> nn.Module:
    """The model of `files` in `dtype` on the CPU, a reward model as `ScoringModel`.

    An adapter is merged with its base model in fp32, whatever `dtype` is.

    Raises:
        ModelError: model or adapter cannot be loaded.
    """
    with explained(files.path):
        is_reward_model = _gives_scores(files, trust_remote_code)
        model: Any
        with files.loading_weights():
            load = load_scoring_model if is_reward_model else load_causal_lm
            model = load(
                files.weights,
                codec,
                dtype=torch.float32 if files.adapter else dtype,
                trust_remote_code=trust_remote_code,
            )
        if files.adapter:
            from peft import PeftModel

            inner = model.classifier if is_reward_model else model
            merged = PeftModel.from_pretrained(inner, files.adapter).merge_and_unload()
            check_finite(merged, files.path)
            model = scoring_model(merged) if is_reward_model else merged
        return model.to(dtype)


def open_codec(files: ModelFiles, trust_remote_code: bool, template: str = "auto") -> Codec:
    """How text becomes ids for the model, as in its training.

    Args:
        template: for a model of unknown origin; auto: its tokenizer's chat template, if there is one.

    Raises:
        TemplateError: `template` is not the one of the training, or does not suit the tokenizer.
        ModelError: the tokenizer cannot be used, or is not the one of the training.
    """
    trained = files.provenance
    if trained is None:
        tokenizer = load_tokenizer(files.tokenizer, trust_remote_code=trust_remote_code)
        with files.loading_weights():
            check_vocabulary(files.weights, tokenizer, trust_remote_code)
        if tokenizer.eos_token_id is None:
            raise ModelError(files.path, "the tokenizer has no end token, so no answer would ever end")
        guess = "chat" if getattr(tokenizer, "chat_template", None) else _DEFAULT_TEMPLATE
        chosen = guess if template == "auto" else template
        ends, two_sided = published_ends(files.weights), reads_source(files.weights, trust_remote_code)
        return make_codec(tokenizer, chosen, further_ends=ends, two_sided=two_sided)
    if template not in ("auto", trained.template):
        raise TemplateError(
            template, f"{files.path} was trained with the template {trained.template}: leave the option out"
        )
    return trained_codec(
        trained,
        files.path,
        weights=files.weights,
        tokenizer_source=files.tokenizer,
        trust_remote_code=trust_remote_code,
    )


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises InputError for a GPU that does not exist."""
    count = torch.cuda.device_count()
    device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(name, f"there is no such GPU ({count} found): use cpu or auto")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format called `name`; `auto` depends on the device."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else resolve_dtype("auto")


def quiet() -> None:
    """Suppress the libraries' progress bars and advice, because the terminal shows the responses."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def _find(path: str, options: LoadOptions) -> tuple[ModelFiles, bool]:
    """The files of a model, and whether it is a reward model."""
    quiet()
    with writing_to("--data_output_path", options.data_output_path):
        files = find_model(path, options.data_output_path, merge_adapter=options.merge_adapter)
    return files, _gives_scores(files, options.trust_remote_code)


def _gives_scores(files: ModelFiles, trust_remote_code: bool) -> bool:
    if files.has_score_head:
        return True
    with files.loading_weights():
        return gives_scores(files.weights, trust_remote_code)


def _load(files: ModelFiles, options: LoadOptions) -> LoadedModel:
    with named_by("--device"):
        device = choose_device(options.device)
    with naming_flags():
        codec = open_codec(files, options.trust_remote_code, options.template)
    if files.provenance is None and options.template == "auto":
        print(
            f"note: {files.path} does not say how it was trained (it has no provenance.json): template "
            f"{codec.template.name} is used; --template chooses another of {', '.join(TEMPLATE_NAMES)}",
            file=sys.stderr,
            flush=True,
        )
    model: Any = load_merged(files, codec, options.trust_remote_code, choose_dtype(options.dtype, device))
    config = (model.classifier if isinstance(model, ScoringModel) else model).config
    return LoadedModel(model.to(device).eval(), codec, device, max_positions(config))
