"""What does a window owe the next process?"""
