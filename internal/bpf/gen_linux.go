package bpf

// The generated files are committed: building needs no clang. "make generate"
// makes them anew, and a test compares.

//go:generate go tool bpf2go -go-package bpf -target bpfel -tags linux -cflags "-O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu" steer steer.c
//go:generate go tool bpf2go -go-package bpf -target bpfel -tags linux -cflags "-O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu" fence fence.c
//go:generate go tool bpf2go -go-package bpf -target bpfel -tags linux -cflags "-O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu" egress egress.c
