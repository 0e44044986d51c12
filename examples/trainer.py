"""Fine-tune a text classifier with Transformers' Trainer, at 30 % of full fine-tuning's FLOPs.

python examples/trainer.py --model google/bert_uncased_L-4_H-256_A-4 --train train.csv --test test.csv

Both files have a column `text` and a column `label` (integers from 0). --model is a name on the hub or a folder.
"""

from __future__ import annotations

import argparse
import json

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from rgft.integrations import enable


def main() -> None:
    """Trains, evaluates, saves, and prints what was spent on what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--budget", type=float, default=0.3, help="share of full fine-tuning's FLOPs")
    parser.add_argument("--epochs", type=float, default=3, help="of that full fine-tuning")
    parser.add_argument("--output", default="output")
    options = parser.parse_args()

    data = load_dataset("csv", data_files={"train": options.train, "test": options.test})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)
    classes = max(data["train"]["label"]) + 1
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=classes),
        args=TrainingArguments(
            output_dir=options.output, num_train_epochs=options.epochs, per_device_train_batch_size=32,
            learning_rate=2e-4, warmup_steps=0.1, logging_steps=20, save_strategy="epoch",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
    )  # fmt: skip
    guide = enable(trainer, budget=options.budget)  # all that RGFT needs
    trainer.train()  # or train(resume_from_checkpoint=True)
    print(trainer.evaluate())
    trainer.save_model()
    print(json.dumps(guide.summary()["flops"], indent=2))
    print("errs most:", ", ".join(name for name, _ in guide.error_map.top(3)))


if __name__ == "__main__":
    main()
