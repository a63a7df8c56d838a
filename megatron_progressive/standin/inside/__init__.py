"""What goes onto the path of a process on the stand-in: its ``sitecustomize``, and the package
``mprog_standin`` that this imports. They import nothing of the package that they lie in, of which
the process may use another copy."""
