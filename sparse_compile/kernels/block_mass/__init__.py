"""Dense attention that keeps its log-sum-exp, and the softmax mass of every pair of groups made from it."""
