"""Small random-weight language models with a tokenizer of bytes, and a generation backend in this process."""

from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

from modelhostd.worker.backend import Answer, InferContext, LoadContext, Tensor
from modelhostd.worker.backends.generation.backend import TextGenerationBackend

PROMPTS = ("hello", "a much longer prompt, it is", "x", "more of it")
CONTEXT = 96
END = 257
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(folder, template=TEMPLATE):
    """Save a tokenizer whose tokens are the 256 bytes, 256 = begin, 257 = end."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary |= {"<s>": 256, "</s>": END}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, vocab_size=258,
        max_position_embeddings=CONTEXT, eos_token_id=END, bos_token_id=256,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, vocab_size=258,
        eos_token_id=END, bos_token_id=256,
    ),
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, vocab_size=258, sliding_window=8,
        max_position_embeddings=CONTEXT, eos_token_id=END, bos_token_id=256,
    ),
    "bloom": lambda: transformers.BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, vocab_size=258, eos_token_id=END, bos_token_id=256,
    ),
}  # fmt: skip


def save_model(folder: Path, kind="llama", seed=3, **tokenizer):
    """Save a model whose weights are so large that its texts differ."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.initializer_range = 0.3
    save_tokenizer(folder, **tokenizer)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


def load(folder, **more):
    """Load a backend in this process."""
    backend = TextGenerationBackend()
    backend.load(LoadContext("m", Path(folder), "text-generation", "cpu", **more))
    return backend


class Reader(Answer):
    """Takes answers; ``room`` is how many it still takes."""

    def __init__(self, *, streaming=True, room=10**9):
        self.streaming = streaming
        self.room = room
        self.gone = False
        self.got = []
        self.ended = False
        self.error = None

    @property
    def ready(self):
        """Whether it takes another."""
        return self.room > 0

    @property
    def unwanted(self):
        """Whether it is gone."""
        return self.gone

    def send(self, outputs, *, last):
        """Take one."""
        assert self.room > 0
        assert not self.ended
        self.room -= 1
        self.got.append({name: part[0] for name, part in outputs.items()})
        self.ended = last

    def fail(self, error):
        """Take an error."""
        assert not self.ended
        self.ended, self.error = True, error

    @property
    def text(self):
        """The whole text."""
        return b"".join(one["text_output"] for one in self.got)


def texts(*values):
    """Return texts as a BYTES tensor."""
    array = np.empty(len(values), object)
    array[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return Tensor("BYTES", array)


def flag(value):
    """Return a BOOL tensor."""
    return Tensor("BOOL", np.array([value]))


def begin(backend, prompt, reader=None, *, inputs=None, **parameters):
    """Begin a text; return its reader."""
    reader = reader or Reader()
    given = {"text_input": texts(prompt), "stream": flag(reader.streaming), **(inputs or {})}
    backend.begin(given, InferContext(parameters=parameters), reader)
    return reader


def run(backend):
    """Step until nothing can go on; return the steps."""
    steps = 1
    while backend.step():
        steps += 1
    return steps


def expected(model, folder, prompt, max_tokens):
    """Return the text that the library's own ``generate`` gives for one prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(
            ids, do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=END
        )
    new = out[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).encode(), len(new)
