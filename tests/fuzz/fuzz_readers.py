"""Coverage-guided fuzzing of the readers, with atheris (``pip install atheris``).

    python tests/fuzz/fuzz_readers.py [TARGET ...] --seconds 60 --out findings

Each target runs in a process of its own for that long. Anything but a clean read or an error of
pointcanon that names the file is a finding: the file that made it is left in ``--out``; put it into
``tests/fuzz/findings`` once the reader is mended, and the tests read it from then on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]


def fuzz(name: str, seconds: int, out: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["pointcanon", "trimesh"]):
        from targets import TARGETS

    from pointcanon.errors import PointcanonError

    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm"))
    tempfile.tempdir = str(folder)  # of targets that put files in place
    corpus = folder / "corpus"
    corpus.mkdir()
    sound = list(target.sound())
    for number, content in enumerate(sound):
        (corpus / str(number)).write_bytes(content)
    longest = max(20_000, 2 * max(map(len, sound)))  # a seed that is cut short is no sound file
    path = folder / f"file{target.suffix}"

    def one(content: bytes) -> None:
        path.write_bytes(content)
        try:
            target.read(path)
        except PointcanonError as error:
            if str(path) not in str(error):
                raise RuntimeError(f"the error does not name the file: {error}") from error

    warnings.simplefilter("ignore")
    limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=3000"]
    limits += [f"-max_len={longest}"]
    prefix = f"-artifact_prefix={out.resolve()}/{name}-"
    atheris.Setup([sys.argv[0], str(corpus), *limits, prefix, "-verbosity=0"], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help="names in targets.py; all of them by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--out", type=Path, default=Path("findings"), help="folder of the findings")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.here:
        fuzz(options.targets[0], options.seconds, options.out)
    names = options.targets
    if not names:
        from targets import TARGETS

        names = list(TARGETS)
    command = [sys.executable, __file__, "--here", f"--seconds={options.seconds}"]
    failed = [
        name
        for name in names
        if subprocess.run([*command, f"--out={options.out}", name], check=False).returncode
    ]
    print(f"{len(names)} targets, {len(failed)} with findings: {' '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
