"""The data stream: text in, batches out, in an order that no number of ranks, workers or restarts changes.

    source ──► window ──► mixture ──► tokenize ──► pack ──► loader ──► trainer ──► ledger
    named      N rows     which       a lane's     rows of  batches,   the step    digest of
    rows       permuted   source      part of a    seq_len  read                   what the
               and dealt  is next     window       + 1      ahead                  step was fed
    └───────────────── one lane; L of them ─────────────┘
                       a rank owns the lanes with lane % W == rank

Sequence g of the run comes from lane g % L; step s takes sequences s*B .. s*B + B - 1, so the global batch of a step
is the same on any number of ranks W that divides L and B. A lane's state is counters only: never text, never tokens.
"""
