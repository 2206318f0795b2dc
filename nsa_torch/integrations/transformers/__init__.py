"""Native Sparse Attention in models of Hugging Face transformers: Llama, Mistral, Qwen2, Qwen3.

    model = use_nsa(llama, window=128)              # from a dense model, whose weights it copies, or
    config = NSALlamaConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, window=128)
    model = NSALlamaForCausalLM(config)             # a new one

They are ordinary transformers models: batches padded on either side with an `attention_mask`, `generate` with a cache
(greedy, sampling, beams, assisted), gradient checkpointing, torch.compile, `save_pretrained`, and, once this module is
imported, `from_pretrained` of AutoModel, AutoModelForCausalLM and AutoModelForSequenceClassification. Packed sequences
come as `cu_seq_lens_q`, as for FlashAttention, or as `position_ids` that restart. Needs transformers 5.
"""

from .attention import NSASelfAttention
from .cache import NSAModelCache
from .convert import use_nsa
from .families import (
    NSALlamaConfig,
    NSALlamaForCausalLM,
    NSALlamaForSequenceClassification,
    NSALlamaModel,
    NSAMistralConfig,
    NSAMistralForCausalLM,
    NSAMistralForSequenceClassification,
    NSAMistralModel,
    NSAQwen2Config,
    NSAQwen2ForCausalLM,
    NSAQwen2ForSequenceClassification,
    NSAQwen2Model,
    NSAQwen3Config,
    NSAQwen3ForCausalLM,
    NSAQwen3ForSequenceClassification,
    NSAQwen3Model,
)
from .modeling import CACHE

__all__ = [
    "CACHE",
    "NSALlamaConfig",
    "NSALlamaForCausalLM",
    "NSALlamaForSequenceClassification",
    "NSALlamaModel",
    "NSAMistralConfig",
    "NSAMistralForCausalLM",
    "NSAMistralForSequenceClassification",
    "NSAMistralModel",
    "NSAModelCache",
    "NSAQwen2Config",
    "NSAQwen2ForCausalLM",
    "NSAQwen2ForSequenceClassification",
    "NSAQwen2Model",
    "NSAQwen3Config",
    "NSAQwen3ForCausalLM",
    "NSAQwen3ForSequenceClassification",
    "NSAQwen3Model",
    "NSASelfAttention",
    "use_nsa",
]
