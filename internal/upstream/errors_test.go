package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"imdsgate/internal/upstream"
)

func TestIsNotKept(t *testing.T) {
	soon := time.Now().Add(24 * time.Hour).Unix()
	good := tokenBody("t", time.Unix(soon, 0), 24*time.Hour)
	with := func(name, value string) http.Header { return http.Header{name: {value}} }
	for name, tc := range map[string]struct {
		status int
		header http.Header
		body   string
	}{
		"without_expires_on":      {200, nil, `{"access_token":"t","expires_in":"86400"}`},
		"expired":                 {200, nil, tokenBody("t", time.Now().Add(-time.Minute), 24*time.Hour)},
		"expires_in_nothing":      {200, nil, tokenBody("t", time.Unix(soon, 0), 0)},
		"expires_on_in_words":     {200, nil, `{"access_token":"t","expires_on":"tomorrow"}`},
		"expires_on_below_zero":   {200, nil, `{"access_token":"t","expires_on":"-1"}`},
		"expires_on_far_too_late": {200, nil, `{"access_token":"t","expires_on":"99999999999999"}`},
		"expires_in_fraction":     {200, nil, fmt.Sprintf(`{"access_token":"t","expires_in":3.5,"expires_on":"%d"}`, soon)},
		"expires_on_twice":        {200, nil, fmt.Sprintf(`{"access_token":"t","expires_on":"1","expires_on":"%d"}`, soon)},
		"no_token":                {200, nil, fmt.Sprintf(`{"expires_on":"%d"}`, soon)},
		"no_json":                 {200, nil, "<html>"},
		"no_object":               {200, nil, `["t"]`},
		"cut_off":                 {200, nil, good[:len(good)-1]},
		"something_behind":        {200, nil, good + "{}"},
		"no_store":                {200, with("Cache-Control", "No-Store"), good},
		"vary":                    {200, with("Vary", "User-Agent"), good},
		"cookie":                  {200, with("Set-Cookie", "a=b"), good},
		"compressed":              {200, with("Content-Encoding", "gzip"), good},
		"digest":                  {200, with("Content-Md5", "x"), good},
		"no_content":              {204, nil, ""},
		"accepted":                {202, nil, good},
		"redirect":                {302, nil, good},
		"bad_request":             {400, nil, `{"error":"invalid_request","error_description":"other"}`},
		"forbidden":               {403, nil, good},
		"not_found":               {404, nil, good},
		"gone":                    {410, nil, good},
		"error_500":               {500, nil, good},
		"unavailable":             {503, nil, good},
	} {
		t.Run(name, func(t *testing.T) {
			s := saying(tc.status, tc.body)
			plain := s.answer
			s.answer = func(ctx context.Context, r upstream.Request) (*upstream.Answer, error) {
				a, err := plain(ctx, r)
				for n, v := range tc.header {
					a.Header[n] = v
				}
				return a, err
			}
			c := cacheOver(t, &upstream.Cache{Source: s})
			for i := range 3 {
				a, body, err := read(t, c, tokenFor(vault))
				if err != nil || a.Status != tc.status || body != tc.body || a.Cache != "" {
					t.Errorf("got %v, %d %q %q, want it as it came", err, a.Status, body, a.Cache)
				}
				if n := s.calls.Load(); n != int32(i+1) {
					t.Errorf("got %d calls for %d requests", n, i+1)
				}
			}
		})
	}
}

func TestSourceErrorIsNotKept(t *testing.T) {
	away := errors.New("away")
	s := &source{answer: func(context.Context, upstream.Request) (*upstream.Answer, error) { return nil, away }}
	c := cacheOver(t, &upstream.Cache{Source: s})
	for i := range int32(3) {
		if _, _, err := read(t, c, tokenFor(vault)); !errors.Is(err, away) || s.calls.Load() != i+1 {
			t.Errorf("got %v after %d calls, want the error of another call", err, s.calls.Load())
		}
	}
}

// What everybody asks for in vain may be repeated to them, for a second.
func TestShortMemoryOfErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		body   string
	}{
		"identity_not_found": {400, `{"error":"invalid_request","error_description":"Identity not found"}`},
		"throttled":          {429, `{"error":"too_many_requests"}`},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := saying(tc.status, tc.body)
				c := cacheOver(t, &upstream.Cache{Source: s})
				for _, from := range []string{"", upstream.Hit, upstream.Hit} {
					a, body, err := read(t, c, tokenFor(vault))
					if err != nil || a.Status != tc.status || body != tc.body || a.Cache != from {
						t.Errorf("got %v %d %q %q, want %d %q", err, a.Status, body, a.Cache, tc.status, from)
					}
				}
				time.Sleep(time.Second)
				if ask(t, c, tokenFor(vault)); s.calls.Load() != 2 {
					t.Errorf("got %d calls, want another after a second", s.calls.Load())
				}
			})
		})
	}
}
