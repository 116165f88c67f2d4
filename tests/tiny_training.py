"""A data module of a few tiny chats, for tests of what runs around training."""

from __future__ import annotations

import lightning as L
import torch
from peft import LoraConfig
from tiny_models import pack_batch
from torch.utils.data import DataLoader

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.modules import SFTModule
from lightning_qlora.schema import Conversation, Message, Origin

CHATS = (
    ("Hi", "Hello!"),
    ("What is the capital of France?", "Paris."),
    ("How are you today?", "I'm fine, thank you."),
    ("0 1 2 3", "4 5 6"),
    ("Please answer.", "The answer is 7."),
    ("fox", "The quick brown fox jumps over the lazy dog."),
)


class TinyChats(L.LightningDataModule):
    """Packed batches of ``chats_per_batch`` chats, the same in training and validation, in a fixed order."""

    def __init__(self, tokenizer, chats=CHATS, chats_per_batch=2):
        super().__init__()
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer)
        turns = [(Message("user", question), Message("assistant", answer)) for question, answer in chats]
        rows = [self.chat.encode(Conversation(t, Origin("chats", i))) for i, t in enumerate(turns)]
        groups = [rows[i : i + chats_per_batch] for i in range(0, len(rows), chats_per_batch)]
        self.batches = [
            pack_batch([torch.tensor(r.input_ids) for r in group], [torch.tensor(r.supervised) for r in group])
            for group in groups
        ]

    @property
    def stop_token_ids(self):
        return self.chat.stop_token_ids

    @property
    def control_token_ids(self):
        return self.chat.control_token_ids

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.batches[:1], batch_size=None)

    def test_dataloader(self):
        return DataLoader(self.batches[:1], batch_size=None)


def tiny_sft_module(folder, *, lr=5e-2, r=8, dropout=0.0, **options):
    torch.manual_seed(0)
    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    return SFTModule(folder, lora=lora, lr=lr, lr_scheduler=None, untrained_tokens="ignore", **options)


def tiny_trainer(root, **options):
    defaults = {
        "accelerator": "cpu",
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return L.Trainer(**{**defaults, **options})
