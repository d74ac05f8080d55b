package main

import (
	"strings"
	"testing"
)

func TestFilter(t *testing.T) {
	for _, tc := range []struct{ name, in, out, skips string }{
		{"passed", `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- PASS: TestA (0.00s)\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t1.2s\n"}
{"Action":"pass","Package":"p","Elapsed":1.2}
`, "ok  \tp\t1.2s\n", ""},
		{"skipped", `{"Action":"output","Package":"p","Test":"TestA/x","Output":"=== RUN   TestA/x\n"}
{"Action":"output","Package":"p","Test":"TestA/x","Output":"    require_linux.go:78: needs root: not root\n"}
{"Action":"output","Package":"p","Test":"TestA/x","Output":"--- SKIP: TestA/x (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestA/x","Elapsed":0}
{"Action":"skip","Package":"p","Test":"TestB","Elapsed":0}
`, "", "needs root: not root\tp.TestA/x\nno reason given\tp.TestB\n"},
		{"failed", `{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:3: got 1, want 2\n"}
{"Action":"output","Package":"q","Test":"TestA","Output":"    of another package\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- FAIL: TestA (0.00s)\n"}
{"Action":"fail","Package":"p","Test":"TestA","Elapsed":0}
{"Action":"output","Package":"p","Output":"FAIL\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p","Elapsed":0.1}
`, "    a_test.go:3: got 1, want 2\n--- FAIL: TestA (0.00s)\nFAIL\nFAIL\tp\t0.1s\n", ""},
		{"panicked", `{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"panic: out of luck\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p","Elapsed":0.1}
`, "panic: out of luck\nFAIL\tp\t0.1s\n", ""},
		{"does_not_compile", `{"ImportPath":"p","Action":"build-output","Output":"./a.go:1:1: expected 'package'\n"}
{"ImportPath":"p","Action":"build-fail"}
{"Action":"output","Package":"p","Output":"FAIL\tp [build failed]\n"}
{"Action":"fail","Package":"p","Elapsed":0,"FailedBuild":"p"}
`, "./a.go:1:1: expected 'package'\nFAIL\tp [build failed]\n", ""},
		{"no_test_files", `{"Action":"output","Package":"p","Output":"?   \tp\t[no test files]\n"}
{"Action":"skip","Package":"p","Elapsed":0}
`, "?   \tp\t[no test files]\n", ""},
		{"no_events", "pattern ./...: no\n{ is no JSON", "pattern ./...: no\n{ is no JSON", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out, skips strings.Builder
			if err := filter(strings.NewReader(tc.in), &out, &skips); err != nil {
				t.Fatal(err)
			}
			if out.String() != tc.out || skips.String() != tc.skips {
				t.Errorf("got %q and %q, want %q and %q", out.String(), skips.String(), tc.out, tc.skips)
			}
		})
	}
}
