"""Methods that use curvature: directions, step lengths, and the solvers made of them."""
