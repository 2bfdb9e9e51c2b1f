"""Small configurations, and devices that have what a test gives them."""

import dataclasses

from gptjax.config import PUBLISHED
from gptjax.engine import memory
from gptjax.support.runtime import DeviceMemory

GIB = 1 << 30
SMALL = dataclasses.replace(
    PUBLISHED["gpt2"], vocab_size=101, context_length=70, width=96, num_layers=2, num_heads=6, mlp_width=224
)
TALES = dataclasses.replace(
    PUBLISHED["gpt2"], vocab_size=8192, context_length=512, width=256, num_layers=6, num_heads=4, mlp_width=1024
)


def device_of(available: int, platform: str = "cpu") -> DeviceMemory:
    return DeviceMemory("cpu" if platform == "cpu" else "Fake GPU", platform, 2 * available, available, available)


def give(monkeypatch, device: DeviceMemory) -> None:
    """Lets the device seem to have this memory."""
    monkeypatch.setattr(memory, "device_memory", lambda device_=None: device)
