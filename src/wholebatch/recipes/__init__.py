"""Training jobs that run as they stand, and the way in for a job of one's own.

A recipe is anything with four functions: a module, an instance, a class that takes no arguments, a namespace.

    def data(split):                  # "train" or "validation" -> a sequence of rows
    def model():                      # -> a torch.nn.Module
    def collate(rows):                # a list of rows -> a micro-batch
    def loss(model, micro_batch):     # -> the mean loss, or (loss_sum, targets)

``wholebatch train my_file.py`` trains what stands in a file, ``wholebatch train my_file.py:recipe`` one name of it.
What a recipe may say beyond the four is in `wholebatch.recipes.protocol`.
"""
