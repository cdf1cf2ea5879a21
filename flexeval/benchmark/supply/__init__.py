"""How files of data come to a machine: downloaded, unpacked, carried over, and checked. Knows files; no benchmark."""
