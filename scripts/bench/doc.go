// Package bench measures imdsgate beside what people use instead, all in network
// namespaces of its own, and nothing else: see docs/benchmarks.md. "make bench"
// measures; "go test" of this package only sees that every part of it works.
package bench
