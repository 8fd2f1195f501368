"""What is looked at before step 1: does the run fit, and can it learn?"""
