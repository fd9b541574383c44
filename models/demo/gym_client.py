"""Client of the desk-arm simulator's ``sim_gym`` server (binary protocol over pipes)."""

from __future__ import annotations

import json
import struct
import subprocess

import numpy as np

PICK, TOUCH, ANY = 0, 1, 255
RANDOM_PHRASE = 0xFFFFFFFF


class Gym:
    """A batch of simulated desks in one server process."""

    def __init__(self, command: list[str], envs: int, size: int = 96) -> None:
        self.process = subprocess.Popen(
            [*command, "--envs", str(envs), "--size", str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdin and self.process.stdout
        self.tx, self.rx = self.process.stdin, self.process.stdout
        self.meta = json.loads(self.rx.readline())
        self.envs = envs
        self.info_names: list[str] = self.meta["info"]
        self.column = {name: i for i, name in enumerate(self.info_names)}
        self.lower = np.array(self.meta["lower"], np.float32)
        self.upper = np.array(self.meta["upper"], np.float32)
        shape = (len(self.meta["cameras"]), self.meta["height"], self.meta["width"])
        self.label_shape = shape
        self.observation = np.dtype(
            [
                ("images", "u1", (*shape, 3)),
                ("state", "<f4", 6),
                ("advice", "<f4", 6),
                ("info", "<f4", len(self.info_names)),
            ]
        )

    def _read(self, size: int) -> bytes:
        data = self.rx.read(size)
        if len(data) != size:
            raise EOFError("the simulator ended")
        return data

    def reset(
        self, env: int, seed: int, kind: int = ANY, colour: int = -1, bin_: int = -1, phrase: int = RANDOM_PHRASE
    ) -> str:
        """Starts an episode and returns its instruction."""
        self.tx.write(b"R" + struct.pack("<IQBiiI", env, seed, kind, colour, bin_, phrase))
        self.tx.write(b"I" + struct.pack("<I", env))
        self.tx.flush()
        (length,) = struct.unpack("<I", self._read(4))
        return self._read(length).decode()

    def step(self, targets: np.ndarray, active: np.ndarray | None = None) -> None:
        """Advances the active desks by 0.1 s towards absolute joint targets [envs, 6]."""
        data = np.empty(self.envs, np.dtype([("active", "u1"), ("target", "<f4", 6)]))
        data["active"] = 1 if active is None else active
        data["target"] = np.clip(targets, self.lower, self.upper)
        self.tx.write(b"S" + data.tobytes())

    def observe(self) -> np.ndarray:
        """Images, joint positions, the expert's advice and the information values of every desk."""
        self.tx.write(b"O")
        self.tx.flush()
        return np.frombuffer(self._read(self.observation.itemsize * self.envs), self.observation)

    def labels(self) -> np.ndarray:
        """Class of every pixel [envs, cameras, H, W]."""
        self.tx.write(b"L")
        self.tx.flush()
        size = int(np.prod(self.label_shape)) * self.envs
        return np.frombuffer(self._read(size), np.uint8).reshape(self.envs, *self.label_shape)

    def close(self) -> None:
        """Ends the server."""
        self.tx.close()
        self.process.wait(timeout=10)
