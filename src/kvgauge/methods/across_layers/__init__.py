"""What layers share: xKV's subspaces of a group of layers, and MiniCache's merged pairs."""
