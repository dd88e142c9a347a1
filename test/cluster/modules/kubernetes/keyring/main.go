// Command keyring judges answers of a credential provider as a kubelet takes them: with its own strict codec and its own keyring.
//
// A line of its standard input is a case: the keys that there are credentials for, an image, and what the provider has answered.
// It prints a line for each case whose answer has a kubelet try other credentials than all of them would, or in another order,
// and in the end the number of cases.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/kubelet/pkg/apis/credentialprovider"
	"k8s.io/kubelet/pkg/apis/credentialprovider/install"
	keyring "k8s.io/kubernetes/pkg/credentialprovider"
)

// testCase is a line.
type testCase struct {
	// Keys are those of the records; the username of each is the key itself.
	Keys   []string        `json:"keys"`
	Image  string          `json:"image"`
	Answer json.RawMessage `json:"answer"`
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "keyring:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) error {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	// As pkg/credentialprovider/plugin/plugin.go has it.
	codecs := serializer.NewCodecFactory(scheme, serializer.EnableStrict)
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	n := 0
	for ; lines.Scan(); n++ {
		var c testCase
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return fmt.Errorf("case %d: %w", n, err)
		}
		got, err := c.answered(codecs)
		if want := lookup(c.Keys, c.Image); err != nil || !slices.Equal(got, want) {
			_, _ = fmt.Fprintf(out, "%s of %q: a kubelet would try %q, and tries %q (%v)\n", c.Image, c.Keys, want, got, err)
		}
	}
	_, _ = fmt.Fprintln(out, n)
	return lines.Err()
}

// answered returns what a kubelet tries with an answer.
func (c testCase) answered(codecs serializer.CodecFactory) ([]string, error) {
	object, _, err := codecs.UniversalDecoder().Decode(c.Answer, nil, nil)
	if err != nil {
		return nil, err
	}
	response, ok := object.(*credentialprovider.CredentialProviderResponse)
	if !ok || response.CacheDuration == nil || response.CacheDuration.Duration < 0 {
		return nil, errors.New("it is no response, or has no duration")
	}
	if (response.CacheDuration.Duration > 0) != (len(response.Auth) > 0) {
		return nil, errors.New("its duration is not that of what it holds")
	}
	var keys []string
	for key, auth := range response.Auth {
		if auth.Username != key {
			return nil, errors.New("it has another credential for " + key)
		}
		keys = append(keys, key)
	}
	return lookup(keys, c.Image), nil
}

// lookup returns what a kubelet tries that has credentials for these keys.
func lookup(keys []string, image string) (tried []string) {
	config := keyring.DockerConfig{}
	for _, key := range keys {
		config[key] = keyring.DockerConfigEntry{Username: key}
	}
	ring := &keyring.BasicDockerKeyring{}
	ring.Add(nil, config)
	found, _ := ring.Lookup(image)
	for _, auth := range found {
		tried = append(tried, auth.Username)
	}
	return tried
}
