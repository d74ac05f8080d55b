// Command sdkclient asks for tokens with Azure's SDK for Go, as an application
// would, and prints one JSON line for each credential that it tried. The tokens
// go to files, never to the output.
//
//	sdkclient --tokens DIR CREDENTIAL...
//
// A CREDENTIAL is "default", "system", "client-id=ID", "object-id=ID" or
// "resource-id=ID". The SDK keeps tokens per process: only the first of two
// credentials that mean the same identity asks the service.
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

const scope = "https://management.azure.com/.default"

// attempt is the line for one credential.
type attempt struct {
	Credential string  `json:"credential"` // as on the command line
	Claims     claims  `json:"claims"`     // of the token, not verified
	ExpiresOn  int64   `json:"expires_on"` // Unix seconds, as the SDK has it; 0 without a token
	File       string  `json:"file"`       // where the token is; empty without one
	Error      string  `json:"error"`
	Took       float64 `json:"took_ms"`
}

type claims struct {
	Audience string `json:"aud"`
	ObjectID string `json:"oid"`
	ClientID string `json:"appid"`
}

func main() {
	dir := flag.String("tokens", "", "folder that tokens are written to")
	flag.Parse()
	if err := run(context.Background(), os.Stdout, *dir, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "sdkclient:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, w io.Writer, dir string, names []string) error {
	if dir == "" || len(names) == 0 {
		return errors.New("want --tokens DIR and credentials")
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for i, name := range names {
		if err := enc.Encode(try(ctx, name, filepath.Join(dir, fmt.Sprintf("%d.jwt", i)))); err != nil {
			return err
		}
	}
	return nil
}

// try makes one credential and asks it for one token.
func try(ctx context.Context, name, file string) attempt {
	a := attempt{Credential: name}
	start := time.Now()
	token, err := ask(ctx, name)
	a.Took = float64(time.Since(start).Microseconds()) / 1000
	if err == nil {
		a.ExpiresOn, a.File = token.ExpiresOn.Unix(), file
		a.Claims, err = readClaims(token.Token)
	}
	if err == nil {
		err = os.WriteFile(file, []byte(token.Token), 0o600)
	}
	if err != nil {
		a.Error = err.Error()
	}
	return a
}

func ask(ctx context.Context, name string) (azcore.AccessToken, error) {
	c, err := credential(name)
	if err != nil {
		return azcore.AccessToken{}, err
	}
	return c.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{scope}})
}

func credential(name string) (azcore.TokenCredential, error) {
	kind, value, _ := strings.Cut(name, "=")
	var id azidentity.ManagedIDKind
	switch kind {
	case "default":
		return azidentity.NewDefaultAzureCredential(nil)
	case "system":
	case "client-id":
		id = azidentity.ClientID(value)
	case "object-id":
		id = azidentity.ObjectID(value)
	case "resource-id":
		id = azidentity.ResourceID(value)
	default:
		return nil, fmt.Errorf("unknown credential %q", name)
	}
	return azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{ID: id})
}

// readClaims reads what a JWT says, as an application may that only wants to
// know who it is.
func readClaims(token string) (claims, error) {
	var c claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, fmt.Errorf("token has %d parts, want 3", len(parts))
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return c, fmt.Errorf("token: %w", err)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("token: %w", err)
	}
	return c, nil
}
