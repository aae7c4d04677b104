"""The store: what goes in is whole, what is withdrawn is gone, and no process or kill changes that."""

import contextlib
import datetime
import io
import signal
import sqlite3
import sys
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image

import erasure.pipelines.index
import erasure.pipelines.store
from erasure.eval.worldkit.detectors import WEIGHTS
from erasure.eval.worldkit.detectors import load as world_detector
from erasure.pipelines import OpenClipEmbedder, Store, Withdrawn
from tests.colours import FACTS, Colours, add, add_for_ever, add_many, die_at, picture
from tests.processes import PROCESSES


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store.sqlite", Colours())


def pixels(image):
    return np.asarray(image).tolist()


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def raw(store, statement, *values):
    """What any other program sees in the file."""
    with contextlib.closing(sqlite3.connect(store.path)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def on_disk(store):
    """Every byte of the store's files."""
    return b"".join(file.read_bytes() for file in sorted(store.path.parent.glob(f"{store.path.name}*")))


def whole(store):
    """The state of a store, after checking that its tables agree."""
    assert raw(store, "PRAGMA integrity_check") == [("ok",)]
    there, every = store.entries(), store.entries(withdrawn=True)
    ids = [one.id for one in there]
    assert [id for (id,) in raw(store, "SELECT entry FROM contents ORDER BY entry")] == ids
    assert [id for (id,) in raw(store, "SELECT entry FROM vectors ORDER BY entry")] == ids
    log = [(event.action, event.entry) for event in store.log()]
    gone = {one.id for one in every if one.withdrawn}
    assert sorted(log) == sorted([*(("added", one.id) for one in every), *(("withdrawn", id) for id in gone)])
    for one in there:
        store.picture(one.id)
    return ids


# --- adding and reading ----------------------------------------------------------------------------------------------


def test_what_is_added_comes_back(store):
    until = datetime.date.today() + datetime.timedelta(days=400)
    id = store.add(picture(1), caption=" a hero ", licence="CC-BY-4.0", source="Ann", subject="hero", until=until)
    one = store.get(id)
    assert (one.id, one.caption, one.licence, one.source, one.subject) == (1, "a hero", "CC-BY-4.0", "Ann", "hero")
    assert one.until.date() == until and one.until.utcoffset() == datetime.timedelta(0) and one.withdrawn is None
    assert pixels(store.picture(id)) == pixels(picture(1))
    assert store.entries() == [one] == store.entries(subject="Hero") and store.entries(subject="x") == []
    (event,) = store.log()
    assert (event.action, event.entry, event.time) == ("added", 1, one.added)


def test_files_and_bytes_are_read_the_right_way_up_and_without_exif(store, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    data = png(picture(1), exif=exif)
    (tmp_path / "one.png").write_bytes(data)
    id = store.add(tmp_path / "one.png", caption="a", **FACTS)
    assert pixels(store.picture(id)) == pixels(picture(1).transpose(Image.Transpose.ROTATE_270))
    assert b"secret" in data and b"secret" not in on_disk(store)
    with pytest.raises(ValueError, match="same picture is entry 1"):
        store.add(data, caption="b", **FACTS)


def test_a_folder_holds_its_store(tmp_path):
    store = Store(tmp_path, Colours())
    assert store.path == tmp_path / "store.sqlite"
    add(store, 1)
    assert len(Store(tmp_path / "store.sqlite").entries()) == 1


CUT = png(picture(1))[:300]
SEEN_THROUGH = Image.new("RGBA", (4, 4), (255, 0, 0, 99))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"licence": ""}, "needs a licence"),
        ({"licence": None}, "needs a licence"),
        ({"source": " "}, "needs a source"),
        ({"caption": "\n"}, "needs a caption"),
        ({"caption": "half \ud800"}, "half a character"),
        ({"subject": None}, "needs a subject"),
        ({"picture": CUT}, "cannot be read"),
        ({"picture": b"no picture"}, "cannot be read"),
        ({"picture": b""}, "cannot be read"),
        ({"picture": SEEN_THROUGH}, "transparent"),
        ({"until": datetime.date(2020, 1, 1)}, "must lie ahead"),
        ({"until": datetime.datetime(2120, 1, 1)}, "needs its zone"),
        ({"until": "tomorrow"}, "until is a date; got 'tomorrow'"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_is_left(store, given, message):
    with pytest.raises(ValueError, match=message):
        store.add(**{"picture": picture(1), "caption": "a", **FACTS, **given})
    assert whole(store) == [] and store.log() == []


def test_a_file_that_is_not_there_is_said_to_be_missing(store, tmp_path):
    with pytest.raises(FileNotFoundError):
        store.add(tmp_path / "none.png", caption="a", **FACTS)


@pytest.mark.parametrize("id", [7, 0, -1, 2**70, True, None, "1", 1.0])
def test_unknown_entries_are_named(store, id):
    add(store, 1)
    for ask in (store.get, store.picture):
        with pytest.raises(ValueError, match="has no entry .* 1 to 1"):
            ask(id)


# --- embeddings ------------------------------------------------------------------------------------------------------


class Wrong(Colours):
    """An embedder that goes wrong on one kind of input."""

    def __init__(self, row, word="bad"):
        super().__init__()
        self.row, self.word = row, word

    def text_features(self, texts):
        rows = super().text_features(texts)
        return torch.tensor(self.row).expand(len(texts), -1) if self.word in texts[0] else rows


@pytest.mark.parametrize(
    "row, message",
    [
        ([1.0, float("nan"), 0, 0], "no number for 'bad'"),
        ([float("inf"), 0.0, 0, 0], "no number for 'bad'"),
        ([0.0, 0.0, 0.0, 0.0], "zero"),
    ],
)
def test_embeddings_that_are_no_numbers_are_refused(tmp_path, row, message):
    store = Store(tmp_path / "s", Wrong(row))
    add(store, 1)
    with pytest.raises(ValueError, match=message):
        store.add(picture(2), caption="bad", **FACTS)
    with pytest.raises(ValueError, match=message):
        store.nearest(["bad"])
    assert whole(store) == [1]


def test_embedders_of_no_use_are_refused_at_once(tmp_path):
    flat, narrow = Colours(), Colours()
    flat.text_features = lambda texts: torch.ones(4)
    narrow.image_features = lambda images: torch.ones(len(images), 3)
    with pytest.raises(ValueError, match="one vector for each"):
        Store(tmp_path / "s", flat)
    with pytest.raises(ValueError, match="need one space.* 4 and 3"):
        Store(tmp_path / "s", narrow)


def test_a_store_belongs_to_its_embedder(store):
    Store(store.path, Colours("another"))  # nothing is embedded yet
    add(store, 1)
    with pytest.raises(ValueError, match="embedder 'colours'.*'another'.*another model"):
        Store(store.path, Colours("another"))
    with pytest.raises(ValueError, match="other weights"):
        Store(store.path, Colours(scale=9.0))
    wider = Colours()
    wider.text_features = wider.image_features = lambda these: torch.ones(len(these), 6)
    with pytest.raises(ValueError, match=r"4 numbers\).*6 numbers\).*other weights"):
        Store(store.path, wider)
    assert Store(store.path, Colours(scale=1.001)).nearest(["grey"])[0]  # rounding


def test_an_embedder_that_comes_second_is_refused_when_it_adds(tmp_path):
    first, second = Store(tmp_path / "s", Colours()), Store(tmp_path / "s", Colours("another"))
    add(first, 1)
    with pytest.raises(ValueError, match="another model"):
        add(second, 2)
    with pytest.raises(ValueError, match="another model"):
        second.nearest(["red"])
    assert whole(first) == [1]


def test_without_an_embedder_a_store_lists_and_withdraws(store):
    add(store, 1)
    bare = Store(store.path)
    assert len(bare.entries()) == 1
    for ask in (lambda: add(bare, 2), lambda: bare.nearest(["red"])):
        with pytest.raises(ValueError, match="without an embedder"):
            ask()
    bare.withdraw(1)
    assert store.entries() == []


def test_open_clip_models_embed_as_they_do_elsewhere():
    embedder, detector = OpenClipEmbedder.load(WEIGHTS / "clip"), world_detector("clip")
    texts, images = ["a superhero", "a cat"], [picture(1), picture(2)]
    for mine, theirs in (
        (embedder.text_features(texts), detector.text_features(texts)),
        (embedder.image_features(images), detector.image_features(images)),
    ):
        assert torch.allclose(torch.nn.functional.normalize(mine, dim=-1), theirs, atol=1e-6)
    with pytest.raises(ValueError, match="needs weights"):
        OpenClipEmbedder.load("ViT-B-32")


# --- finding ---------------------------------------------------------------------------------------------------------


def plainly(store, queries, by, count, threshold=-1.0):
    """The nearest entries, by a loop over all of them."""
    embedder, out = Colours(), []
    for query in queries:
        features = embedder.text_features if isinstance(query, str) else embedder.image_features
        q, scored = features([query])[0], []
        for one in store.entries():
            x = (
                embedder.text_features([one.caption])
                if by == "caption"
                else embedder.image_features([store.picture(one.id)])
            )
            scored.append((float(q @ x[0] / q.norm() / x[0].norm()), -one.id))
        out.append([(-id, cosine) for cosine, id in sorted(scored, reverse=True)[:count] if cosine >= threshold])
    return out


@pytest.mark.parametrize("by", ["caption", "picture"])
def test_the_nearest_are_those_of_a_plain_loop_after_every_change(store, by):
    other = Store(store.path, Colours())  # with an index of its own
    queries, shown = ["a red thing", "blue and green"], [picture(50, "green")]

    def agrees():
        for some in (queries, shown):
            for count, threshold in ((1, -1.0), (3, -1.0), (9, 0.7)):
                for one in (store, other):
                    near = one.nearest(some, by=by, count=count, threshold=threshold)
                    found = [[(f.entry.id, f.similarity) for f in row] for row in near]
                    for mine, theirs in zip(found, plainly(store, some, by, count, threshold), strict=True):
                        assert [id for id, _ in mine] == [id for id, _ in theirs]
                        assert [c for _, c in mine] == pytest.approx([c for _, c in theirs], abs=1e-5)
        return found

    assert store.nearest(queries) == [[], []] and store.nearest([]) == []
    for seed, colour in enumerate(["red", "green", "grey"]):
        add(store, seed, colour)
    assert agrees()
    store.withdraw(1)
    add(other, 7, "blue")
    assert agrees()
    found = store.nearest(["blue"], by=by)[0][0]
    assert found.entry.id == 4 and pixels(found.picture) == pixels(picture(7, "blue"))


def test_questions_without_sense_are_refused(store):
    add(store, 1)
    with pytest.raises(ValueError, match="queries is a list"):
        store.nearest("red")
    with pytest.raises(ValueError, match="an empty path"):
        Store("")
    for bad in ({"by": "colour"}, {"count": 0}, {"count": "2"}, {"count": True}):
        with pytest.raises(ValueError, match="by is one of"):
            store.nearest(["red"], **bad)
    with pytest.raises(ValueError, match="apart"):
        store.nearest(["red", picture(1)])
    with pytest.raises(ValueError, match="unknown index"):
        Store(store.path, index="ann")


def test_faiss_finds_the_same_where_it_is_installed_and_is_asked_for_where_not(store, monkeypatch):
    """With a stand-in: the package is optional. Its two indices here compare with everything."""
    for seed, colour in enumerate(["red", "green", "blue", "grey", "red"]):
        add(store, seed, colour)

    class Flat:
        def __init__(self, width):
            self.rows = np.zeros((0, width), np.float32)

        def add(self, rows):
            self.rows = np.concatenate([self.rows, rows])

        def search(self, queries, count):
            cosines = queries @ self.rows.T
            at = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
            found = np.take_along_axis(cosines, at, axis=1)
            at[:, count - 1 :] = -1 if count == 4 else at[:, count - 1 :]  # as faiss says that it found no more
            return found, at

    class Lists(Flat):
        def __init__(self, coarse, width, lists, metric):
            assert isinstance(coarse, Flat) and metric == "inner" and lists == 2
            super().__init__(width)

        def train(self, rows):
            self.trained = len(rows)

    module = types.SimpleNamespace(IndexFlatIP=Flat, IndexIVFFlat=Lists, METRIC_INNER_PRODUCT="inner")
    monkeypatch.setitem(sys.modules, "faiss", module)
    queries = ["red", "a green and a blue thing"]
    exact = store.nearest(queries, count=3)
    for few in (10_000, 2):
        monkeypatch.setattr(erasure.pipelines.index, "FEW", few)
        near = Store(store.path, Colours(), index="faiss").nearest(queries, count=3)
        assert [[f.entry.id for f in row] for row in near] == [[f.entry.id for f in row] for row in exact]
    assert [len(row) for row in Store(store.path, Colours(), index="faiss").nearest(queries, count=4)] == [3, 3]
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        Store(store.path, Colours(), index="faiss")


def test_a_large_store_says_once_that_it_compares_with_everything(store, monkeypatch):
    monkeypatch.setattr(erasure.pipelines.index, "MANY", 2)
    add(store, 1), add(store, 2)
    with pytest.warns(UserWarning, match="2 entries.*index='faiss'"):
        store.nearest(["red"])


# --- withdrawing -----------------------------------------------------------------------------------------------------


def traces(store, id):
    """Pieces of an entry that lie in the files, and would show that it is still there."""
    tables = "contents JOIN vectors USING (entry)"
    data, caption, vector = raw(
        store, f"SELECT contents.picture, contents.caption, vectors.picture FROM {tables} WHERE entry = ?", id
    )[0]
    parts = [data[i : i + 24] for i in range(64, len(data) - 80, 48)]  # those on two pages lie apart
    found = [piece for piece in [*parts, caption.encode(), vector] if piece in on_disk(store)]
    assert caption.encode() in found and vector in found and len(found) > 0.8 * len(parts)
    return found


def test_nothing_of_a_withdrawn_entry_is_left_in_the_files(store):
    rng = np.random.default_rng(0)
    for seed in range(12):
        size = tuple(int(side) for side in rng.integers(4, 90, 2))
        store.add(picture(seed, size=size), caption=f"secret {rng.bytes(9).hex()}", **FACTS)
    kept = {id: pixels(store.picture(id)) for id in (2, 3, 5, 7, 11)}
    pieces = {id: traces(store, id) for id in range(1, 13)}
    for id in (6, 1, 12, 4, 9, 10, 8):
        store.withdraw(id)
        add(store, 100 + id)  # what comes after moves pages about
        assert [piece for piece in pieces[id] if piece in on_disk(store)] == []
    assert {id: pixels(store.picture(id)) for id in kept} == kept
    assert all(piece in on_disk(store) for id in kept for piece in pieces[id])
    whole(store)


def test_a_reader_of_the_old_state_delays_the_last_bytes_and_is_reported(tmp_path):
    store = Store(tmp_path / "s", Colours(), timeout=0.2)
    add(store, 1)
    pieces = traces(store, 1)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM entries").fetchall()
        with pytest.raises(TimeoutError, match=r"every new request sees it.*purge\(\)"):
            store.withdraw(1)
        assert store.entries() == [] and any(piece in on_disk(store) for piece in pieces)
    store.purge()
    assert not any(piece in on_disk(store) for piece in pieces)


def test_a_subject_is_withdrawn_as_a_whole_with_its_reason(store):
    for seed, subject in enumerate(["hero", "cat", "Hero", ""]):
        add(store, seed, subject=subject)
    taken = store.withdraw("HERO", reason="asked for by Ann")
    assert [one.id for one in taken] == [1, 3]
    assert all(one.caption is None and one.licence == FACTS["licence"] and one.withdrawn for one in taken)
    assert [(e.action, e.entry, e.reason) for e in store.log()[4:]] == [
        ("withdrawn", 1, "asked for by Ann"), ("withdrawn", 3, "asked for by Ann")
    ]  # fmt: skip
    assert whole(store) == [2, 4] and store.entries(withdrawn=True)[0] == taken[0] == store.get(1)
    with pytest.raises(Withdrawn, match="entry 3 was withdrawn on") as caught:
        store.picture(3)
    assert caught.value.ids == (3,)
    assert store.withdraw("hero") == [] == store.withdraw([1, 3]) and len(store.log()) == 6


def test_an_unknown_one_among_several_withdraws_none(store):
    add(store, 1, subject="hero")
    for which, message in (
        ([1, 9], "no entry 9"), ("her", "did you mean 'hero'"), ("", "has the subject"), (True, "no entry True")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            store.withdraw(which)
    assert whole(store) == [1]


def test_a_withdrawn_picture_does_not_come_back_by_mistake_and_numbers_are_not_used_again(store):
    add(store, 1)
    store.withdraw(1)
    with pytest.raises(Withdrawn, match="was entry 1, withdrawn on.*again=True"):
        add(store, 1)
    assert add(store, 1, again=True) == 2
    with pytest.raises(ValueError, match="is entry 2"):
        add(store, 1, again=True)
    assert whole(store) == [2]


def test_entries_go_at_their_date(store, monkeypatch):
    zone = datetime.timezone(datetime.timedelta(hours=2))
    add(store, 1, "red", until=datetime.datetime(2100, 1, 1, 2, tzinfo=zone)), add(store, 2, "grey")
    assert store.withdraw_due() == [] and store.nearest(["red"])[0][0].entry.id == 1

    def at(hour, minute):
        moment = datetime.datetime(2099, 12, 31, hour, minute, tzinfo=datetime.UTC)
        monkeypatch.setattr(erasure.pipelines.store, "now", lambda: moment + datetime.timedelta(minutes=1))

    at(23, 58)
    assert store.nearest(["red"])[0][0].entry.id == 1
    at(23, 59)
    assert store.nearest(["red"])[0][0].entry.id == 2
    assert whole(store) == [2] and store.log()[-1].reason == "the date set when it was added"


def test_rows_of_the_log_stay(store):
    add(store, 1)
    for statement in ("DELETE FROM log", "UPDATE log SET reason = 'x'", "DELETE FROM entries"):
        with pytest.raises(sqlite3.IntegrityError):
            raw(store, statement)
    assert len(store.log()) == 1


# --- files -----------------------------------------------------------------------------------------------------------


def test_other_files_are_refused_and_left_alone(tmp_path):
    text, other, newer = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    text.write_bytes(b"no database, but long enough to be one" * 99)
    with contextlib.closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE mine (x)")
    raw(Store(newer), "PRAGMA user_version = 2")
    for file, message in ((text, "no store"), (other, "another program"), (newer, "update the library")):
        before = file.read_bytes()
        with pytest.raises(ValueError, match=message):
            Store(file)
        assert file.read_bytes() == before


def test_a_store_that_vanished_is_not_made_anew(store):
    add(store, 1)
    store.path.unlink()
    with pytest.raises(OSError, match="cannot be read or written"):
        store.entries()
    assert not store.path.exists()


def test_a_damaged_store_is_named(store):
    for seed in range(9):
        add(store, seed)
    data = bytearray(store.path.read_bytes())
    data[100:3000] = b"\xff" * 2900
    store.path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        store.entries()


# --- several at once -------------------------------------------------------------------------------------------------


def test_a_writer_that_never_ends_is_named(tmp_path):
    store = Store(tmp_path / "s", Colours(), timeout=0.2)
    add(store, 1)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TimeoutError, match="another process has been writing for 0.2 s"):
            add(store, 2)
        assert len(store.entries()) == 1  # reading goes on
    assert add(store, 2) == 2


@pytest.mark.slow
def test_two_processes_that_make_a_store_and_write_lose_nothing(tmp_path):
    path, done, start = tmp_path / "new" / "store.sqlite", PROCESSES.Queue(), PROCESSES.Barrier(3)
    halves = [range(0, 15), range(15, 30)]
    workers = [PROCESSES.Process(target=add_many, args=(path, seeds, start, done)) for seeds in halves]
    for worker in workers:
        worker.start()
    start.wait()
    said = dict(done.get(timeout=120) for _ in range(30))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    store = Store(path, Colours())
    assert whole(store) == list(range(1, 31)) == sorted(said.values())
    assert all(pixels(store.picture(id)) == pixels(picture(seed)) for seed, id in said.items())


def test_readers_see_whole_states_while_others_write(store):
    add(store, 0, "red")
    stop, faults = threading.Event(), []

    def write():
        own = Store(store.path, Colours())
        for seed in range(1, 25):
            id = add(own, seed, "red")
            own.withdraw(id - 1)  # one is there at any moment, or two
        stop.set()

    def read():
        while not stop.is_set():
            try:
                (row,) = store.nearest(["red"], count=9)
                assert len(row) in (1, 2), row
            except Exception as error:  # seen in the other thread
                faults.append(error)
                return

    threads = [threading.Thread(target=work) for work in (write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and whole(store) == [25]


@pytest.mark.parametrize("what", ["add", "withdraw"])
def test_a_process_killed_before_any_statement_leaves_all_or_nothing(store, what):
    add(store, 1, subject="early"), add(store, 2, subject="early"), add(store, 3)
    pieces, seen, statement = traces(store, 1), set(), 0
    while True:
        worker = PROCESSES.Process(target=die_at, args=(store.path, statement, what))
        worker.start()
        worker.join()
        there = whole(store)
        seen.add(tuple(there))
        if worker.exitcode == 0:
            break
        assert worker.exitcode == -signal.SIGKILL
        statement += 1
    if what == "add":
        assert statement > 8 and seen == {(1, 2, 3), (1, 2, 3, 4)}
    else:
        assert statement > 8 and seen == {(1, 2, 3), (3,)}
        assert not any(piece in on_disk(store) for piece in pieces)


def test_a_process_killed_at_any_moment_loses_nothing_that_it_had_said(store):
    said = {}
    for turn in range(5):
        mine, theirs = PROCESSES.Pipe(duplex=False)
        worker = PROCESSES.Process(target=add_for_ever, args=(store.path, 10_000 * turn, theirs))
        worker.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            for _ in range(3 + turn):
                seed, id = mine.recv()
                said[id] = seed
            worker.kill()
            while True:  # what it said before it died
                seed, id = mine.recv()
                said[id] = seed
        worker.join()
        assert set(said) <= set(whole(store))
    assert len(said) >= 25
    assert all(pixels(store.picture(id)) == pixels(picture(seed)) for id, seed in said.items())
