"""SIGKILL in the second phase, between epochs and inside one, and the run continued."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from helpers import bits, quiet, same_bits, toy_images
from helpers import toy_convnet as convnet

SETTINGS = {"epochs": 60, "tau": 2, "checkpoint_every": 3}
MODES = {
    "base": {},
    "gd": {"second_phase": "gd", "gd": {"steps": 40}},
    "sgd": {"second_phase": "sgd"},
}
CHILD = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    import test_killed
    from helpers import quiet, toy_images, toy_convnet

    class Slow:
        def on_epoch_end(self, run, record):
            print(record["epoch"], flush=True)
            time.sleep(0.01)

    settings = dict(test_killed.SETTINGS, **test_killed.MODES[{mode!r}])
    quiet(toy_convnet(), {folder!r}, callbacks=[Slow()], **settings).fit(toy_images(33))
""")


@pytest.mark.parametrize("after", [0.0, 0.02])
@pytest.mark.parametrize("mode", MODES)
def test_killed_and_resumed(tmp_path, mode, after):
    data, settings = toy_images(33), {**SETTINGS, **MODES[mode]}
    whole = convnet()
    reference = quiet(whole, **settings).fit(data)
    code = CHILD.format(tests=str(Path(__file__).parent), mode=mode, folder=str(tmp_path))
    # not from the source folder, whose package need not have been compiled
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 6:
            break
    time.sleep(after)
    child.kill()
    child.wait()
    assert child.returncode == -9
    model = convnet(seed=4)
    result = quiet(model, tmp_path, **settings).fit(data, resume=True)
    assert result.status == "completed" and same_bits(bits(whole), bits(model))
    assert result.guarantee.curve == reference.guarantee.curve
    assert torch.isfinite(model.head["out"].weight).all()
