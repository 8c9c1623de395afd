"""The operators and their backends: the only room that knows of more than one backend.

`problem` is the contract of a call, `reference` what it computes, `operators` and `autograd` the way of a call,
`backends` which implementation runs it, `native` the one of csrc/.
"""
