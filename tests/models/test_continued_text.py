"""What is generated continues the prompt: the space that a SentencePiece token begins with stays."""

import gptjax
from tests.oracles import llama_random
from tests.text.sentencepiece_material import llama2_json
from tests.text.text_material import write_json


def test_the_first_space_of_a_completion_stays(tmp_path):
    file = llama2_json()
    model = llama_random.checkpoint(3, num_hidden_layers=1, vocab_size=len(file["model"]["vocab"]))
    write_json(llama_random.write(tmp_path, model), "tokenizer.json", file)
    with gptjax.load(tmp_path, max_length=32) as lm:
        (token,) = lm.tokenizer.encode("the")
        assert lm.tokenizer.token_bytes(token) == b" the" and lm.tokenizer.decode([token]) == "the"
        options = {"logit_bias": {token: 100.0}, "max_tokens": 2}
        assert lm.generate("once upon", **options).text == " the the"
        assert "".join(chunk.text for chunk in lm.stream("once upon", **options)) == " the the"
