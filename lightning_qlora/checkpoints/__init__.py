"""What a checkpoint is made of, and how it is read back.

``publishing`` puts a folder of files where no kill and no full disk can tear it. What stands in the folder:
``adapter_folder`` the files that PEFT reads, ``identity`` and ``run_record`` what they belong to and come from,
``checkpoint_io`` the resumable half, with ``loop_state`` and the random generators in it. ``boundary`` waits for the
moment between two optimizer steps at which a checkpoint can be taken.
"""
