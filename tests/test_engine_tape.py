"""What launches can be recorded: those of a thread that does not wait for the device meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch

from flexeval.engine.compute.tape import CudaTapes


@pytest.mark.gpu
@pytest.mark.parametrize("does_wait", [False, True])
@pytest.mark.parametrize("do_others_wait", [False, True])
def test_only_what_the_thread_itself_waits_for_counts(does_wait: bool, do_others_wait: bool) -> None:
    numbers = torch.arange(3, device="cuda")

    def wait() -> None:
        torch.cuda.current_stream().synchronize()
        numbers.sum().item()

    other = threading.Thread(target=wait)
    with CudaTapes(torch.cuda.Stream()).waits() as waits:
        if do_others_wait:
            other.start()
            other.join()
        if does_wait:
            wait()
    assert bool(waits) is does_wait
    assert torch.cuda.get_sync_debug_mode() == 0
