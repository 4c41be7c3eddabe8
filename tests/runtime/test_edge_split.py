"""Edge split: published sizes, exact cuts, a checked wire, distillation that touches nothing else, links that break."""

import copy
import socket
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convette.errors import DataError, StructureError, TrainingError, UsageError
from convette.models import create_model
from convette.runtime.edge_split import (
    Bottleneck,
    EdgeClient,
    EdgeDelay,
    EdgeServer,
    NeuralFilter,
    ShapedLink,
    cut,
    cut_points,
    decode,
    dequantize,
    distil_head,
    encode,
    from_jpeg,
    inject,
    pick_threshold,
    quantize,
    to_jpeg,
)
from convette.runtime.edge_split.bottleneck import _rounded


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Parts ----------------------------------------------------------------------------------------------------------------


def test_the_bottleneck_and_the_filter_have_the_published_sizes():
    part = Bottleneck(64, 256, 3)
    assert (count(part.encoder), count(part.decoder), count(NeuralFilter(64))) == (148_992, 428_166, 88_402)
    with torch.device("meta"):
        big = Bottleneck(64, 256, 3)
        crossing = big.encoder(torch.empty(1, 64, 200, 304))
        assert crossing.shape == (1, 3, 204, 308) and big.decoder(crossing).shape == (1, 256, 200, 304)
    message = encode(np.zeros((1, 3, 204, 308), np.float32))
    assert len(message) - 188_496 == 16 + 4 * 4
    with pytest.raises(UsageError):
        Bottleneck(4, 4, 0)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = create_model("resnet20", in_channels=1, seed=0)
    with torch.no_grad():
        model.train()(torch.randn(16, 1, 16, 16))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def student(teacher, images):
    return inject(teacher, "layer1", images, channels=2, width=8).eval()


def test_every_cut_is_exact_for_any_batch(teacher, images):
    points = cut_points(teacher, images)
    assert points[0].name in ("bn1", "conv1") and {"layer1", "layer1.1", "layer2.0", "layer3"} <= {
        p.name for p in points
    }
    for name in ("conv1", "layer1", "layer2.0", "layer3"):
        parts = cut(teacher, images, name)
        for batch in (images[:1], images):
            with torch.no_grad():
                crossing = parts.head(batch)
                assert torch.equal(parts.tail(crossing), teacher(batch))
        assert tuple(crossing.shape[1:]) == parts.point.shape and parts.point.bytes == crossing[0].numel()
    with pytest.raises(StructureError, match="Did you mean"):
        cut(teacher, images, "layer1.0.conv1")  # the shortcut crosses beside it


def test_head_codec_and_tail_are_the_student(student, images):
    parts = cut(student, images, "layer1.encoder")
    with torch.no_grad():
        crossing = parts.head(images)
        assert torch.equal(parts.tail(crossing), student(images))
        sent = torch.from_numpy(decode(encode(crossing.numpy(), 32)))
        assert torch.equal(parts.tail(sent), student(images))
    assert parts.point.shape == (2, 20, 20)


def test_distillation_trains_the_bottleneck_and_nothing_else(teacher, student, images):
    import copy

    trained = copy.deepcopy(student)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    losses = distil_head(
        trained, teacher, lambda epoch: images.split(3), "layer1", features=["layer2", "layer3"], epochs=6,
        learning_rate=0.01,
    )  # fmt: skip
    assert losses[-1] < 0.9 * losses[0] and len(losses) == 6
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("layer1"), name
    same = distil_head(copy.deepcopy(teacher), teacher, lambda epoch: [images], "linear", epochs=1)
    assert same == [0.0]  # the teacher's own part
    one, other = (copy.deepcopy(student) for _ in range(2))
    distil_head(one, teacher, lambda epoch: [images], "layer1", epochs=1)
    factors = {"layer2": 0.0}
    distil_head(other, teacher, lambda epoch: [images], "layer1", features=["layer2"], factors=factors, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_only_a_stage_that_keeps_the_size_can_be_replaced(teacher, images):
    for name, word in (("layer2", "equal size"), ("linear", "equal size"), ("layer9", "not there"), ("", "not there")):
        with pytest.raises(StructureError, match=word) as caught:
            inject(teacher, name, images)
        assert "layer1" in str(caught.value).partition("Those that can: ")[2]


def test_a_feature_that_is_not_there_and_weights_that_are_broken_are_told(teacher, student, images):
    with pytest.raises(StructureError, match="Did you mean 'layer2'"):
        distil_head(student, teacher, lambda epoch: [images], "layer1", features=["layr2"])
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.layer1.encoder[0].weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="bottleneck layer1 is not finite"):
        distil_head(broken, teacher, lambda epoch: [images], "layer1", epochs=1)


def test_rounding_what_crosses_while_training_is_the_wire_s_rounding(teacher, student, images):
    """With many bits nothing changes; with few the bottleneck learns from what was rounded."""
    found = {}
    for bits in (None, 24, 2):
        other = copy.deepcopy(student)
        distil_head(other, teacher, lambda epoch: [images], "layer1", epochs=1, bits=bits)
        found[bits] = other.layer1.encoder[0].weight
        assert not other.layer1.encoder._forward_hooks
    assert torch.allclose(found[None], found[24], atol=1e-4) and not torch.allclose(found[None], found[2], atol=1e-4)
    z = torch.randn(2, 3, 4, 4)
    sent = decode(encode(z.numpy()))
    assert np.allclose(_rounded(z, 8).numpy(), sent, atol=1e-5)


def test_the_threshold_keeps_the_recall():
    generator = np.random.default_rng(0)
    worth = generator.random(400) < 0.4
    scores = np.where(worth, generator.normal(0.7, 0.2, 400), generator.normal(0.3, 0.2, 400))
    recalls = []
    for threshold in np.linspace(scores.min(), scores.max(), 30):
        recalls.append((scores[worth] >= threshold).mean())
    assert recalls[0] == 1 and recalls == sorted(recalls, reverse=True)
    for recall in (0.5, 0.9, 0.99, 1.0):
        kept = (scores[worth] >= pick_threshold(scores, worth, recall)).mean()
        assert recall <= kept <= recall + 1 / worth.sum()
    with pytest.raises(UsageError):
        pick_threshold(scores, np.zeros(400, bool))


# The wire -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.floats(1e-3, 1e3), st.floats(-100, 100))
@settings(max_examples=30, deadline=None)
def test_eight_bits_are_off_by_half_a_step_at_most(seed, spread, shift):
    values = (np.random.default_rng(seed).normal(size=(2, 3, 4)) * spread + shift).astype(np.float32)
    q, scale, low = quantize(values)
    assert np.abs(dequantize(q, scale, low) - values).max() <= scale / 2 * 1.001 + 1e-5 * (abs(shift) + spread)
    assert np.abs(decode(encode(values)) - values).max() <= scale / 2 * 1.001 + 1e-5 * (abs(shift) + spread)
    assert (decode(encode(values, 32)) == values).all()
    assert np.allclose(decode(encode(values, 16)), values, rtol=1e-3, atol=1e-4)


def test_bytes_go_as_they_are_and_constants_survive():
    image = np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4)
    assert decode(encode(image)).dtype == np.uint8 and (decode(encode(image)) == image).all()
    assert (decode(encode(np.full((1, 4), 2.5, np.float32))) == 2.5).all()
    with pytest.raises(DataError, match="not finite"):
        encode(np.array([np.nan], np.float32))
    with pytest.raises(DataError, match="8, 16 and 32"):
        encode(np.zeros(2, np.float32), 4)


def test_a_damaged_message_is_refused_before_it_is_read():
    good = encode(np.zeros((1, 3, 4), np.float32))
    huge = good[:16] + struct.pack("<3I", 2**31, 2**31, 4) + good[28:]
    scale = good[:8] + struct.pack("<ff", float("nan"), 0) + good[16:]
    for message in (
        b"",
        b"PK\x03\x04" + good[4:],
        good[:-1],
        good + b"x",
        good[:18],
        huge,
        scale,
        good[:4] + b"\x09" + good[5:],
    ):
        with pytest.raises(DataError):
            decode(message)


# Execution ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(student, images):
    return cut(student, images, "layer1.encoder")


def test_split_execution_gives_the_student_s_answer_through_a_real_socket(parts, student, teacher, images):
    with EdgeServer(parts.tail) as server, EdgeClient(parts.head, teacher, server.address, timeout=20) as client:
        assert server.address[0] == "127.0.0.1"
        for batch in (images[:1], images):
            answer = client(batch)
            with torch.no_grad():
                expected = student(batch).numpy()
            assert answer.where == "remote" and answer.bytes_sent < 4 * 4 * 4 + 40 + batch.shape[0] * 800
            assert np.abs(answer.outputs - expected).max() < 0.1 * np.abs(expected).max()


def test_a_link_that_drops_in_the_middle_falls_back_and_recovers(parts, teacher, images):
    with (
        EdgeServer(parts.tail) as server,
        ShapedLink(server.address, rate=1e6, latency=0.001) as link,
        EdgeClient(parts.head, teacher, link.address, timeout=20) as client,
    ):
        assert client(images[:1]).where == "remote"
        link.drop_after = link.sent + 400  # half way through the next tensor
        broken = client(images[:1])
        assert broken.where == "fallback" and broken.reason and broken.bytes_sent == 0
        with torch.no_grad():
            assert (broken.outputs == teacher(images[:1]).numpy()).all()
        assert client(images[:1]).where == "fallback"  # still broken
        link.repair()
        assert client(images[:1]).where == "remote"
    assert client(images[:1]).where == "fallback"  # nobody listens any more


def test_a_server_that_never_answers_is_not_waited_for(parts, teacher, images):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        EdgeClient(parts.head, teacher, silent.getsockname()[:2], timeout=0.2) as client,
    ):
        answer = client(images[:1])
    assert answer.where == "fallback" and "Timeout" in answer.reason


def test_a_malformed_message_ends_its_connection_only(parts, teacher, images):
    with EdgeServer(parts.tail, timeout=20) as server:
        for junk in (struct.pack("<I", 5) + b"hello", struct.pack("<I", 2**31)):
            with socket.create_connection(server.address, timeout=20) as stranger:
                stranger.sendall(junk)
                assert stranger.recv(10) == b""  # hung up
        assert len(server.failures) == 2
        with EdgeClient(parts.head, teacher, server.address, timeout=20) as client:
            assert client(images[:1]).where == "remote"


def test_the_filter_sends_nothing_where_nothing_is(parts, teacher, images):
    with EdgeServer(parts.tail) as server:
        for score, where in ((0.2, "filtered"), (0.8, "remote")):
            worth = lambda batch, score=score: torch.full((len(batch),), score)  # noqa: E731
            client = EdgeClient(parts.head, teacher, server.address, worth=worth, threshold=0.5, timeout=20)
            with client:
                answer = client(images[:1])
            assert answer.where == where and (answer.outputs is None) == (where == "filtered")


def test_the_link_keeps_its_rate(parts):
    def echo(values):
        return values[:, :1]

    with (
        EdgeServer(echo) as server,
        ShapedLink(server.address, rate=50_000, latency=0.02) as link,
        EdgeClient(lambda x: x, lambda x: x, link.address, timeout=20) as client,
    ):
        answer = client(torch.randn(1, 10_000))
    assert answer.where == "remote" and answer.seconds > 10_000 / 50_000 + 2 * 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_goes_over_the_wire_and_what_is_none_is_refused(channels):
    ramp = torch.linspace(0, 255, 40).to(torch.uint8).expand(1, channels, 24, 40)
    sizes = []
    for quality in (20, 90):
        file = to_jpeg(ramp, quality)
        back = from_jpeg(torch.from_numpy(decode(encode(file))), (channels, 24, 40))
        assert back.dtype == torch.uint8 and back.shape == ramp.shape
        assert (back.int() - ramp.int()).abs().max() <= (24 if quality == 20 else 8)
        sizes.append(len(file))
    assert sizes[0] < sizes[1]
    with pytest.raises(DataError, match="40x24 pixels"):
        from_jpeg(file, (channels, 24, 41))
    for wrong in (file[:-200], file[::-1].copy(), np.zeros(0, np.uint8)):
        with pytest.raises(DataError, match="JPEG"):
            from_jpeg(wrong, (channels, 24, 40))
    for image, quality in ((ramp, 0), (ramp.float(), 75), (ramp[:, :1].expand(1, 2, 24, 40), 75)):
        with pytest.raises(UsageError):
            to_jpeg(image, quality)


# Delay ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-4, 1.0), min_size=4, max_size=4), st.floats(0, 0.1), st.floats(0.1, 1))
@settings(max_examples=40, deadline=None)
def test_break_even_rates_solve_the_equality(times, latency, passing):
    delay = EdgeDelay(*times, input_bytes=100_000, bottleneck_bytes=9_000, latency=latency, passing=passing)
    for one, other in (("local", "remote"), ("local", "split"), ("remote", "split")):
        rate = delay.break_even(one, other)
        if rate is not None:
            assert delay.seconds(one, rate) == pytest.approx(delay.seconds(other, rate), rel=1e-9)
    assert delay.best(1e-3) == "local"
    fixed = {mode: delay.seconds(mode, 1e18) for mode in ("local", "remote", "split")}
    assert fixed[delay.best(1e18)] == min(fixed.values())
    for wrong in (
        lambda: delay.seconds("cloud", 1),
        lambda: delay.seconds("local", 0),
        lambda: delay.break_even("a", "b"),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_a_network_that_cannot_be_captured_says_so():
    class Odd(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(Exception, match="cannot be cut"):
        cut_points(Odd(), torch.randn(2, 3))
