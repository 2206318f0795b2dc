"""Native Sparse Attention in models of Hugging Face transformers: Llama, Mistral, Qwen2, Qwen3, and more of their kind.

    model = use_nsa(llama, window=128)              # from a dense model, whose weights it copies, or
    config = NSALlamaConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, window=128)
    model = NSALlamaForCausalLM(config)             # a new one

Arcee, Gemma, Granite, Llama, Ministral, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3Moe have NSA...Config, NSA...Model,
NSA...ForCausalLM and, where transformers has it, NSA...ForSequenceClassification. Sliding windows of a family are gone:
NSA's window is for all layers.

They are ordinary transformers models: batches padded on either side with an `attention_mask`, `generate` with a cache
(greedy, sampling, beams, assisted), be it a DynamicCache or a StaticCache of the model's configuration, gradient
checkpointing, torch.compile, `save_pretrained`, PEFT's adapters and virtual tokens, and, once this module is imported,
`from_pretrained` of AutoModel, AutoModelForCausalLM and AutoModelForSequenceClassification. Packed sequences come as
`cu_seq_lens_q`, as for FlashAttention, or as `position_ids` that restart. Needs transformers 5.23 or newer; tested
with 5.23 and 5.24. More in docs/hugging_face.md.
"""

from typing import TYPE_CHECKING, Any

from . import versions  # noqa: F401
from .attention import NSASelfAttention
from .cache import NSAModelCache
from .cache_layer import NSADynamicLayer, NSAStaticLayer
from .convert import use_nsa
from .families import CLASSES
from .modeling import CACHE

globals().update(CLASSES)

__all__ = [  # noqa: PLE0604
    "CACHE",
    "NSADynamicLayer",
    "NSAModelCache",
    "NSASelfAttention",
    "NSAStaticLayer",
    "use_nsa",
    *CLASSES,
]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The families' classes."""
