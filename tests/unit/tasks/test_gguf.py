from pathlib import Path

import pytest
import torch

from rgft.errors import DataError
from rgft.tasks import gguf
from rgft.tasks.chat import chat
from rgft.tasks.models import load_causal_lm, load_classifier, load_tokenizer
from rgft.tasks.token_loss import IGNORED
from tests.gguf_files import TEMPLATE, TOKENS, tiny_llama, write_gguf


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RGFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def test_a_file_is_converted_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(path: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    first = gguf.converted(file)
    assert gguf.converted(file) == first
    assert len(calls) == 1
    assert calls[0] != first  # made aside
    assert [p.name for p in first.parent.iterdir()] == [first.name]
    file.write_bytes(b"GGUF" + bytes(101))
    assert gguf.converted(file) != first


def test_a_failed_conversion_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(DataError, match="cannot be converted: OSError: no space left"):
        gguf.converted(file)
    assert list((file.parent / "cache" / "models").iterdir()) == []


def test_what_is_no_file_or_no_gguf(file: Path) -> None:
    with pytest.raises(DataError, match="expected a GGUF file, found nothing"):
        gguf.converted(file.parent / "other.gguf")
    with pytest.raises(DataError, match="cannot be converted"):
        gguf.converted(file)


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("gguf")
    monkeypatch.setenv("RGFT_CACHE", str(tmp_path / "cache"))
    return write_gguf(tiny_llama(), tmp_path / "tiny.gguf")


def test_a_real_file_gives_the_model_that_it_was_written_from(real: Path) -> None:
    tokenizer = load_tokenizer(str(real))
    model = load_causal_lm(str(real), pad_token_id=tokenizer.pad_token_id)
    ids = torch.tensor([[3, 4, 13, 18, 5]])
    torch.testing.assert_close(model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)
    assert tokenizer("yes a")["input_ids"] == [TOKENS.index("yes"), TOKENS.index("Ġa")]
    assert tokenizer.chat_template == TEMPLATE
    real.unlink()  # what was converted needs no file, but the name is asked for
    with pytest.raises(DataError, match="expected a GGUF file, found nothing"):
        load_tokenizer(str(real))


def test_a_real_file_becomes_a_classifier(real: Path) -> None:
    classifier = load_classifier(str(real), labels=3, seed=0, pad_token_id=2)
    weights = dict(tiny_llama().named_parameters())
    torch.testing.assert_close(
        dict(classifier.named_parameters())["model.layers.1.self_attn.q_proj.weight"],
        weights["model.layers.1.self_attn.q_proj.weight"],
    )
    assert classifier.score.weight.shape == (3, 32)


def test_a_real_file_is_tuned_on_conversations(real: Path, tmp_path: Path) -> None:
    data = tmp_path / "chat.csv"
    data.write_text("question,reply\n" + "".join(f"{a} {b},yes\n" for a in "abcdef" for b in "abcdef"))
    task = chat(model=str(real), train=str(data), messages=("question", "reply"))
    said = [label for label in task.train[0]["labels"] if label != IGNORED]
    assert said == [TOKENS.index("yes"), TOKENS.index("<|im_end|>")]
    assert task.loss(task.model, task.collate([task.train[0]])).shape == (1,)
