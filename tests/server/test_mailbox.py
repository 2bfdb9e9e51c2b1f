"""Calls from other threads reach the event loop in order, and wake it seldom."""

import asyncio
import threading

import pytest

from gptjax.server.generation.mailbox import Mailbox


def test_calls_of_many_threads_keep_each_thread_s_order():
    got, threads, each = [], 4, 2000

    async def run() -> None:
        mailbox = Mailbox()

        def send(thread: int) -> None:
            for number in range(each):
                mailbox.put(lambda number=number: got.append((thread, number)))
                mailbox.wake()

        senders = [threading.Thread(target=send, args=(thread,)) for thread in range(threads)]
        for sender in senders:
            sender.start()
        async with asyncio.timeout(60):
            while len(got) < threads * each:
                await asyncio.sleep(0.001)

    asyncio.run(run())
    for thread in range(threads):
        assert [number for sender, number in got if sender == thread] == list(range(each))


def test_calls_that_come_together_wake_the_loop_once(monkeypatch):
    got, woken = [], []

    async def run() -> None:
        mailbox = Mailbox()
        original = mailbox.loop.call_soon_threadsafe
        monkeypatch.setattr(mailbox.loop, "call_soon_threadsafe", lambda *a: (woken.append(1), original(*a)))
        for number in range(100):
            mailbox.put(lambda number=number: got.append(number))
            mailbox.wake()
        await asyncio.sleep(0)
        assert got == list(range(100))
        mailbox.put(lambda: got.append(100))
        await asyncio.sleep(0)
        assert got == list(range(100))
        mailbox.wake()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert got == list(range(101))
    assert len(woken) == 2


def test_what_is_called_meanwhile_does_not_keep_the_loop_from_other_work():
    turns = []

    async def run() -> None:
        mailbox = Mailbox()

        def again() -> None:
            turns.append("mail")
            if len(turns) < 20:
                mailbox.put(again)
                mailbox.wake()

        mailbox.put(again)
        mailbox.wake()
        while len(turns) < 20:
            turns.append("other")
            await asyncio.sleep(0)

    asyncio.run(run())
    assert turns[:6] == ["other", "mail", "other", "mail", "other", "mail"]


def test_a_closed_loop_is_told_each_time():
    async def made() -> Mailbox:
        return Mailbox()

    mailbox = asyncio.run(made())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            mailbox.put(lambda: None)
            mailbox.wake()
