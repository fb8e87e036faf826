"""The live page of runs in progress: served on loopback only, read-only, from their records.

==========  ========================================================================
`watched`   the files of runs and studies, whether they changed, the page made of them
`app`       the WSGI application: who may read what
`server`    the application on a port of 127.0.0.1
`shell`     the page around the page: asks for news, keeps the place
`plain`     a small page of runs without charts
==========  ========================================================================

A run is never touched by it: it reads what the training process writes, in a process of its own.
"""
