"""Rollout batches that another process samples and scores, instead of `rollout.Rollout`: {name: feed}.

The run listens on RUN_FOLDER/feed.sock (mode 0600, one peer of the same user, for the run's whole life). Messages are
JSON, one a line, at most `Wanted.limit_bytes` long:

    run   {"ready": {"batch": 0, "version": 1, "groups": 8, "members": 8, "longest": 512, ...}}    send batch 0 now
    peer  {"batch": 0, "learning_rate": 3e-3, "groups": [[ROW, ROW, ...], ...]}
    run   {"accepted": 0}           or {"refused": "why"}, after which it still waits for batch 0
    ROW   {"ids": [..], "mask": [..], "logprobs": [..], "version": 1, "reward": 0.5, "passed": false, "text": "..", ...}

The lists of a row are aligned: all token ids of the sequence, 1 where the policy sampled the token, its logprob there.
A peer that is gone ends the run; an engine that dies meanwhile is the run's own business, and batch 0 is wanted again.
"""
