"""Writes egm_alloc/vllm/contract.json: what the plugin needs, in the source of each vLLM version.

Of each version's wheel only the modules that matter are fetched, by ranges of bytes.
"""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import types
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

VERSIONS = (
    *("0.20.0", "0.20.1", "0.20.2", "0.21.0", "0.22.0", "0.22.1", "0.23.0", "0.24.0", "0.25.0"),
    *("0.25.1", "0.26.0", "0.27.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0"),
    "0.33.0",
)


def load_contract() -> types.ModuleType:
    """Return egm_alloc.vllm.contract, without the package, which need not be built."""
    for name in ("egm_alloc", "egm_alloc.vllm"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT / name.replace(".", "/"))]
    return importlib.import_module("egm_alloc.vllm.contract")


class RemoteFile(io.RawIOBase):
    """A file behind a URL, of which only what is read is fetched."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._at = 0
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request) as answer:
            self._size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read anywhere."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Choose where the next read begins."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        """Fetch as much as fits the buffer."""
        end = min(self._at + len(buffer), self._size)
        if self._at >= end:
            return 0
        ranges = {"Range": f"bytes={self._at}-{end - 1}"}
        with urllib.request.urlopen(urllib.request.Request(self._url, headers=ranges)) as answer:
            data = answer.read()
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def wheel_url(version: str) -> str:
    """Return where pip would fetch a version from."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
        command += ["--ignore-installed", "--only-binary=:all:", "--python-version", "3.12"]
        command += ["--target", folder, "--report", str(report), f"vllm=={version}"]
        subprocess.run(command, check=True)
        return str(json.loads(report.read_text("utf-8"))["install"][0]["download_info"]["url"])


def main() -> None:
    """Examine every version and write the table."""
    contract = load_contract()
    table = {}
    for version in VERSIONS:
        remote = io.BufferedReader(RemoteFile(wheel_url(version)), 1 << 20)  # type: ignore[type-var]
        with zipfile.ZipFile(remote) as wheel:

            def read(module: str, wheel: zipfile.ZipFile = wheel) -> str | None:
                path = module.replace(".", "/")
                for name in (f"{path}.py", f"{path}/__init__.py"):
                    if name in wheel.NameToInfo:
                        return wheel.read(name).decode()
                return None

            table[version] = contract.examine(read)
        problems = [entry["problem"] for entry in table[version].values() if entry["problem"]]
        print(f"vLLM {version}: {'; '.join(problems) or 'holds'}", flush=True)
    contract.TABLE.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
