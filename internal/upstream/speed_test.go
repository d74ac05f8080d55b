package upstream_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"imdsgate/internal/imds"
	"imdsgate/internal/sim"
	"imdsgate/internal/upstream"
)

// drained is how the gate takes an answer that is in memory.
func drained(b *testing.B, s upstream.Source, r upstream.Request) {
	a, err := s.Answer(context.Background(), r)
	if err != nil || len(a.Bytes) == 0 {
		b.Fatal(err)
	}
	a.Body.Close()
}

func BenchmarkHit(b *testing.B) {
	for name, r := range map[string]upstream.Request{"token": tokenFor(vault), "instance": instance()} {
		b.Run(name, func(b *testing.B) {
			c := cacheOver(b, &upstream.Cache{Source: minting(24 * time.Hour)})
			drained(b, c, r)
			b.ReportAllocs()
			for b.Loop() {
				drained(b, c, r)
			}
		})
		b.Run(name+"_parallel", func(b *testing.B) {
			c := cacheOver(b, &upstream.Cache{Source: minting(24 * time.Hour)})
			drained(b, c, r)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					drained(b, c, r)
				}
			})
		})
	}
}

// BenchmarkMiss is a call of the simulator on 127.0.0.1, by itself and by way of
// budget and cache.
func BenchmarkMiss(b *testing.B) {
	client := listening(b, simulator(b, sim.Config{Limits: sim.Limits{Off: true}}))
	plenty := upstream.Rate{PerSecond: 1e9}
	budget := &upstream.Budget{Source: client, General: plenty, Identity: plenty}
	for _, bm := range []struct {
		name   string
		source upstream.Source
	}{
		{"client", client}, {"budget", budget}, {"cache", cacheOver(b, &upstream.Cache{Source: budget})},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				r := asking(imds.InstanceRead, "/metadata/instance/compute/vmId")
				r.Query.Params = append(r.Query.Params, imds.Param{Name: "format", Value: "text"}, imds.Param{Name: "n", Value: fmt.Sprint(i)})
				a, err := bm.source.Answer(context.Background(), r)
				if err != nil || a.Status != 200 {
					b.Fatal(err, a)
				}
				var p [64]byte
				for err == nil {
					_, err = a.Body.Read(p[:])
				}
				a.Body.Close()
			}
		})
	}
}
