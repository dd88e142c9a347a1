package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// question is what a program is asked, again and again, as the kubelet does: it is started, gets a request on its standard input, and
// has answered when it has ended.
type question struct {
	name    string
	command []string
	env     []string
	request []byte
	// check looks at the answer.
	check func(stdout []byte) error
	// every so many rounds it is asked.
	every int
}

// ask returns how long the answer took, and how much CPU time.
func (q question) ask(ctx context.Context) (took, cpu time.Duration, err error) {
	cmd, stdout, stderr := q.prepare(ctx, q.command)
	begin := time.Now()
	err = cmd.Run()
	took = time.Since(begin)
	if err = q.judge(err, stdout, stderr); err != nil {
		return 0, 0, err
	}
	return took, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// peak returns the peak memory in MiB, with the command peak as the parent.
func (q question) peak(ctx context.Context, parent string) (float64, error) {
	cmd, stdout, stderr := q.prepare(ctx, append([]string{parent}, q.command...))
	if err := q.judge(cmd.Run(), stdout, stderr); err != nil {
		return 0, err
	}
	return lastLineMiB(stderr.String())
}

func (q question) prepare(ctx context.Context, command []string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	cmd = exec.CommandContext(ctx, command[0], command[1:]...) //nolint:gosec // what the benchmark has built
	stdout, stderr = &bytes.Buffer{}, &bytes.Buffer{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(q.request), stdout, stderr
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, q.env...) // all that a service has
	return cmd, stdout, stderr
}

func (q question) judge(err error, stdout, stderr *bytes.Buffer) error {
	if err == nil {
		err = q.check(stdout.Bytes())
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", q.name, err, stderr)
	}
	return nil
}

// lastLineMiB returns the KiB in the last line in MiB.
func lastLineMiB(text string) (float64, error) {
	text = strings.TrimSpace(text)
	kib, err := strconv.ParseInt(text[strings.LastIndexByte(text, '\n')+1:], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read the peak memory: %w", err)
	}
	return float64(kib) / 1024, nil
}

// silent is the check of a program that answers nothing.
func silent(stdout []byte) error {
	if len(stdout) > 0 {
		return errors.New("there is an answer")
	}
	return nil
}

// empty is the check of an answer without a credential.
func empty(stdout []byte) error { return checkAnswer(stdout, nil) }

// hit is the check of an answer with one credential, which opens what it is for.
func hit(opens func(username, password string) bool) func([]byte) error {
	return func(stdout []byte) error { return checkAnswer(stdout, opens) }
}

func checkAnswer(stdout []byte, opens func(username, password string) bool) error {
	var answer struct {
		Kind string
		Auth map[string]struct{ Username, Password string }
	}
	if err := json.Unmarshal(stdout, &answer); err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	want := 0
	if opens != nil {
		want = 1
	}
	if answer.Kind != "CredentialProviderResponse" || len(answer.Auth) != want {
		return fmt.Errorf("the answer is a %q with %d credentials, where %d is right", answer.Kind, len(answer.Auth), want)
	}
	for host, c := range answer.Auth {
		if !opens(c.Username, c.Password) {
			return fmt.Errorf("the credential for %s is wrong", host)
		}
	}
	return nil
}

// requestFor is what the kubelet writes: JSON in one line. The namespace is whose ServiceAccount's token goes with it, none where it
// is empty.
func requestFor(image, namespace string) ([]byte, error) {
	request := struct {
		Kind       string `json:"kind"`
		APIVersion string `json:"apiVersion"`
		Image      string `json:"image"`
		Token      string `json:"serviceAccountToken,omitempty"`
	}{Kind: "CredentialProviderRequest", APIVersion: "credentialprovider.kubelet.k8s.io/v1", Image: image}
	if namespace != "" {
		var err error
		if request.Token, err = serviceAccountToken(namespace, time.Now()); err != nil {
			return nil, err
		}
	}
	raw, err := json.Marshal(request)
	return append(raw, '\n'), err
}

// serviceAccountToken has the claims, and the length, of a token that the kubelet gets for a Pod; nobody has signed it.
func serviceAccountToken(namespace string, now time.Time) (string, error) {
	const uid = "7e0c1c5e-3f0b-4a55-9d6a-0d6f0d5c8a51"
	named := func(name string) map[string]string { return map[string]string{"name": name, "uid": uid} }
	header, err := json.Marshal(map[string]string{"alg": "RS256", "kid": rand.Text() + rand.Text()[:17]})
	if err != nil {
		return "", fmt.Errorf("encode a token: %w", err)
	}
	claims, err := json.Marshal(map[string]any{
		"aud": []string{"imps"}, "exp": now.Add(time.Hour).Unix(), "iat": now.Unix(), "nbf": now.Unix(),
		"iss": "https://kubernetes.default.svc", "jti": uid, "sub": "system:serviceaccount:" + namespace + ":default",
		"kubernetes.io": map[string]any{"namespace": namespace, "node": named("node-1"), "pod": named("app"), "serviceaccount": named("default")},
	})
	if err != nil {
		return "", fmt.Errorf("encode a token: %w", err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	return encode(header) + "." + encode(claims) + "." + encode(randomBytes(256)), nil
}

func randomBytes(n int) []byte {
	raw := make([]byte, n)
	_, _ = rand.Read(raw) // it never fails
	return raw
}
