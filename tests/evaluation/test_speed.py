import json

import numpy as np
import pytest

from tdistill.evaluation.speed import decode_speed, num_parameters, weights_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_size_is_that_of_the_saved_file(make_model, tmp_path, tied):
    model = make_model(0, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    shapes = [entry["shape"] for name, entry in json.loads(raw[8 : 8 + header]).items() if name != "__metadata__"]
    assert weights_bytes(model) == len(raw) - 8 - header
    assert num_parameters(model) == sum(int(np.prod(shape)) for shape in shapes)
    # Where all but the head is on the disk, its tensors have no address.
    model.model.to("meta")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    assert weights_bytes(model) == len(raw) - 8 - header


def test_speed_times_generations_of_fixed_length(make_model):
    model = make_model(0)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.generation_config.eos_token_id = list(range(64))  # every token would end an answer
    speed = decode_speed(model, [np.array([1, 2, 3])], num_tokens=10)
    assert len(calls) == 4 * 10  # one generation to warm up, three that count
    assert 0 < speed.low <= speed.value <= speed.high
