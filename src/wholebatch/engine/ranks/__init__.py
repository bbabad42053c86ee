"""What do ranks say to each other, and when?"""
