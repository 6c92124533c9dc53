import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from supsup.errors import ConfigError
from supsup.fields import with_values
from supsup.seeding import generator
from supsup.streams import VISITS, Segment, Stream
from supsup.tasks import permutation

ALL = list(VISITS)


@pytest.fixture(scope="session")
def open_quick(quick):
    """Six tasks of 40 batches, a decision every 10."""
    values = {
        "scenario": "nns",
        "tasks": 6,
        "train.batches": 40,
        "train.batch_size": 32,
        "openset.decide_every": 10,
        "openset.budget": 50,
    }
    return with_values(quick, values)


def stream_of(config, data, **values) -> Stream:
    return Stream(with_values(config, {f"openset.{k}": v for k, v in values.items()}), data)


@pytest.mark.parametrize("kind", ALL)
def test_every_image_of_the_stream_is_in_one_segment(open_quick, digits, kind):
    stream = stream_of(open_quick, digits, stream=kind)
    segments = list(stream)
    assert [segment.number for segment in segments] == list(range(len(stream)))
    batches = stream.visits[-1].stop
    assert sum(len(s.labels_N) for s in segments) == batches * 32
    assert all(len(s.labels_N) == 320 for s in segments[:-1])
    truth = np.concatenate([stream.truth(s.number) for s in segments])
    assert sorted(set(truth.tolist())) == list(range(6))
    if kind != "fuzzy":
        by_visit = np.repeat(
            [v.task for v in stream.visits], [32 * v.batches for v in stream.visits]
        )
        assert np.array_equal(truth, by_visit)


@pytest.mark.parametrize("kind", ALL)
def test_a_segment_can_be_had_alone_and_in_part(open_quick, digits, kind):
    whole = list(stream_of(open_quick, digits, stream=kind))[5]
    alone = stream_of(open_quick, digits, stream=kind).segment(5)
    part = stream_of(open_quick, digits, stream=kind).segment(5, 2)
    assert np.array_equal(whole.images_NP, alone.images_NP)
    if kind != "drift":
        assert np.array_equal(whole.images_NP[:64], part.images_NP)
    assert np.array_equal(whole.labels_N[:64], part.labels_N)


def test_images_are_those_of_their_task_in_one_order_from_end_to_end(open_quick, digits):
    stream = stream_of(open_quick, digits)
    epochs = [
        generator(open_quick.seed, "stream order", e).permutation(len(digits.train_labels))
        for e in range(6)
    ]
    order = np.concatenate(epochs)
    place = 0
    for segment in stream:
        for i, task in enumerate(stream.truth(segment.number)):
            image = digits.train_images[order[place]]
            seen = image[permutation(open_quick.seed, int(task), digits.pixels)]
            assert np.array_equal(segment.images_NP[i], seen)
            assert segment.labels_N[i] == digits.train_labels[order[place]]
            place += 1


def test_a_segment_says_nothing_about_tasks(open_quick, digits):
    names = {field.name for field in dataclasses.fields(Segment)}
    assert names == {"number", "images_NP", "labels_N", "batch_size", "begins_task"}
    for kind in ALL:
        assert not any(s.begins_task for s in stream_of(open_quick, digits, stream=kind))


def test_told_boundaries_cut_segments_and_are_marked(open_quick, digits):
    stream = stream_of(open_quick, digits, stream="random-length", boundaries="told")
    starts = [s.number for s in stream if s.begins_task]
    truths = [stream.truth(number) for number in range(len(stream))]
    assert all(len(set(truth.tolist())) == 1 for truth in truths)
    assert [truths[number][0] for number in starts] == list(range(6))


def test_drawn_lengths_put_boundaries_anywhere(open_quick, digits):
    visits = stream_of(open_quick, digits, stream="random-length").visits
    assert all(20 <= visit.batches <= 60 for visit in visits)
    assert len({visit.batches for visit in visits}) > 2
    assert any(visit.start % 10 for visit in visits)


def test_recurring_tasks_come_twice_in_order_of_first_appearance(open_quick, digits):
    config = with_values(open_quick, {"tasks": 40})
    stream = stream_of(config, digits, stream="recurring")
    total, appearances = dict.fromkeys(range(40), 0), []
    for visit in stream.visits:
        total[visit.task] += visit.batches
        appearances += [visit.task] if visit.task not in appearances else []
    assert set(total.values()) == {40}
    assert appearances == list(range(40))
    assert len(stream.visits) > 60
    last = {visit.task: visit.stop for visit in stream.visits}
    gone = [stream.finished_by(number) for number in range(len(stream))]
    assert gone[-1] == sorted(last, key=last.get)
    assert all(last[task] <= 10 * (n + 1) for n, tasks in enumerate(gone) for task in tasks)


def test_fuzzy_tasks_mix_around_the_boundary_alone(open_quick, digits):
    config = with_values(open_quick, {"train.batches": 100})
    stream = stream_of(config, digits, stream="fuzzy")
    truth = np.concatenate([stream.truth(number) for number in range(len(stream))]).reshape(-1, 32)
    share = (truth == 1).mean(1)
    assert not share[:90].any()
    assert share[110:190].all()
    zone = share[90:110]
    expected = (np.arange(20) + 0.5) / 20
    assert np.abs(zone - expected).max() < 0.35
    assert np.corrcoef(zone, expected)[0, 1] > 0.9


def test_drift_turns_images_as_torchvision_does(open_quick, digits):
    stream = stream_of(open_quick, digits, stream="drift")
    for batch, angle in ((40, -15.0), (79, 15.0)):
        images = digits.train_images[:32]
        turned = stream._turned(images, batch)
        expected = rotate(
            torch.from_numpy(images).view(-1, 1, 8, 8).float(), angle, InterpolationMode.BILINEAR
        )
        assert np.abs(turned - expected.flatten(1).numpy()).mean() < 0.3
    whole = stream._turned(digits.train_images[:320], 40)
    assert np.array_equal(whole[:32], stream._turned(digits.train_images[:32], 40))


def test_a_stream_shorter_than_a_decision_is_an_error(open_quick, digits):
    with pytest.raises(ConfigError, match=r"stream has 240 batches.*every 241.*lower openset"):
        stream_of(open_quick, digits, decide_every=241)


def test_more_chunks_than_segments_are_an_error(open_quick, digits):
    with pytest.raises(ConfigError, match=r"openset.chunks is 25, must be at most 24"):
        stream_of(open_quick, digits, chunks=25)


def test_tasks_that_are_over_are_counted_as_they_are_listed(quick, digits):
    config = with_values(
        quick, {"scenario": "nns", "openset.stream": "recurring", "openset.decide_every": 5}
    )
    stream = Stream(config, digits)
    for number in range(len(stream)):
        assert stream.count_finished(number) == len(stream.finished_by(number))
    assert stream.count_finished(len(stream) - 1) == config.tasks
