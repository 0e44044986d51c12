"""Loading a pre-trained model and its tokenizer or image processor by name or path.

Weights are loaded in fp32 whatever the checkpoint's type: small steps are lost to rounding in bf16 weights. Autocast is
what saves time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rgft.errors import DataError
from rgft.tasks.gguf import converted


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model; decoders without a padding token pad with their end-of-text token.

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    tokenizer = _loaded(AutoTokenizer, name, "tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise DataError(f"{name}: its tokenizer has neither a padding nor an end-of-text token; set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(name: str, *, labels: int, seed: int, pad_token_id: int, **settings: Any) -> Any:
    """A sequence classification model in fp32; what the checkpoint lacks (the classifier) is initialised from `seed`.

    Args:
        name: hub name or folder.
        labels: number of classes, or of values for regression.
        seed: of new weights; the global random state is left alone.
        pad_token_id: for models whose configuration has none.
        settings: passed on to the configuration (`problem_type`, `id2label`, …).

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A classifier for another number of labels is made anew; the library reports it.
        model = _loaded(
            AutoModelForSequenceClassification,
            name,
            "model",
            dtype=torch.float32,
            num_labels=labels,
            ignore_mismatched_sizes=True,
            **settings,
        )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_token_id
    return model


def load_causal_lm(name: str, *, pad_token_id: int) -> Any:
    """A decoder that predicts next tokens, in fp32.

    Args:
        name: hub name, folder, or `.gguf` file.
        pad_token_id: for models whose configuration has none.

    Raises:
        DataError: it cannot be loaded, its checkpoint lacks weights (a classifier's has no language model's head), or
            it sees the tokens that it would predict (an encoder).
    """
    from transformers import AutoModelForCausalLM

    model, report = _loaded(AutoModelForCausalLM, name, "model", dtype=torch.float32, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"{name}: expected a language model with all its weights, found none for {', '.join(missing[:5])}{more}; "
            f"the checkpoint is one of {', '.join(model.config.architectures or ['an unknown kind'])}"
        )
    _require_causal(name, model)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_token_id
    return model


def load_seq2seq(name: str, *, pad_token_id: int) -> Any:
    """An encoder–decoder, in fp32.

    Args:
        name: hub name or folder.
        pad_token_id: for models whose configuration has none.

    Raises:
        DataError: it cannot be loaded, is of another kind, or has no token from which the decoder starts.
    """
    from transformers import AutoModelForSeq2SeqLM

    model = _loaded(AutoModelForSeq2SeqLM, name, "model", dtype=torch.float32)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_token_id
    if getattr(model.config, "decoder_start_token_id", None) is None:
        raise DataError(f"{name}: expected decoder_start_token_id in its config.json, found none; set it")
    return model


@torch.no_grad()
def _require_causal(name: str, model: Any) -> None:
    """Two inputs that differ in their last token: what is predicted after the first must not."""
    inputs = torch.tensor([[1, 2], [1, 3]]) % model.config.get_text_config().vocab_size
    first = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[:, 0].float()
    if not torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-5 * float(first.abs().max())):
        raise _no_decoder(name, model)


def require_causal_kind(name: str, model: Any) -> None:
    """Raises DataError where the model is an encoder by its configuration: what can be said without weights."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config = model.config
    is_causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_causal:
        raise _no_decoder(name, model)


def _no_decoder(name: str, model: Any) -> DataError:
    return DataError(
        f"{name}: expected a decoder, found {type(model).__name__}, which sees the tokens that it is to predict; "
        "give a decoder (GPT, LLaMA, Qwen, …)"
    )


def positions_of(model: Any) -> int | None:
    """Tokens that an input may have; None where the model's positions are relative, or it does not say."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    if found is None or found < 1 or not getattr(config, "position_biased_input", True):  # DeBERTa's are relative
        return None
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if is_table and module.padding_idx is not None:
            return found - module.padding_idx - 1  # RoBERTa counts from after the padding's
    return found


def require_positions(model: Any, tokens: int, *, setting: str = "max_length") -> None:
    """Raises DataError where the model has fewer positions than an example has tokens.

    Args:
        model: with or without weights.
        tokens: of the longest example.
        setting: by which their number is given.
    """
    found = positions_of(model)
    if found is not None and tokens > found:
        raise DataError(
            f"{setting}: the model has {found} positions, found an example of {tokens} tokens; give "
            f"--{setting.replace('_', '-')} {found} or less"
        )


def load_image_processor(name: str) -> Any:
    """What turns images into a model's input, as the model was trained with.

    Raises:
        DataError: the model has none, or it cannot be loaded.
    """
    from transformers import AutoImageProcessor

    try:
        return _loaded(AutoImageProcessor, name, "image processor")
    except DataError as error:
        raise DataError(
            f"{error}\nImages are prepared by the model's own image processor (preprocessor_config.json); where a "
            "model comes without one, save that of its kind beside it, as "
            'ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(FOLDER)'
        ) from error


def load_image_classifier(name: str, *, names: Sequence[str], seed: int) -> Any:
    """An image classification model in fp32; what the checkpoint lacks (the classifier) is initialised from `seed`.

    Args:
        name: hub name or folder.
        names: of the classes, by label; they go into the model's configuration.
        seed: of new weights; the global random state is left alone.

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoModelForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _loaded(
            AutoModelForImageClassification, name, "model", dtype=torch.float32, num_labels=len(names),
            ignore_mismatched_sizes=True,
            id2label=dict(enumerate(names)), label2id={label: i for i, label in enumerate(names)},
        )  # fmt: skip


def _loaded(factory: Any, name: str, what: str, **settings: Any) -> Any:
    if name.endswith(".gguf"):
        name = str(converted(Path(name).expanduser()))
    looks_like_path = name.startswith((".", "/", "~")) or Path(name).exists()
    folder = Path(name).expanduser()
    if looks_like_path and not (folder / "config.json").is_file():
        found = "a folder without config.json" if folder.is_dir() else "nothing"
        raise DataError(
            f"{name}: expected a folder with a saved model (config.json, weights, tokenizer), found {found}"
        )
    try:
        return factory.from_pretrained(str(folder) if looks_like_path else name, **settings)
    except Exception as error:  # the hub's client and the loaders raise many kinds
        where = "" if looks_like_path else "; it is no folder here, so the hub was asked (see HF_HUB_OFFLINE)"
        raise DataError(f"{name}: the {what} cannot be loaded{where}: {type(error).__name__}: {error}") from error
