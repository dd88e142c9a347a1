package fakeaws

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/stretchr/testify/require"
)

const target = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"

// ask returns a signed request for a token. Edits are made after it was signed.
func ask(t *testing.T, key Key, at time.Time, edits ...func(*http.Request)) *http.Request {
	t.Helper()
	body := []byte("{}")
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "http://aws.test/", bytes.NewReader(body))
	r.Header.Set("Content-Type", "application/x-amz-json-1.1")
	r.Header.Set("X-Amz-Target", target)
	hash := sha256.Sum256(body)
	credentials := aws.Credentials{AccessKeyID: key.AccessKeyID, SecretAccessKey: key.SecretAccessKey, SessionToken: key.SessionToken}
	require.NoError(t, v4.NewSigner().SignHTTP(t.Context(), credentials, r, hex.EncodeToString(hash[:]), "ecr", "eu-central-1", at))
	for _, edit := range edits {
		edit(r)
	}
	return r
}

func TestSignaturesAreVerified(t *testing.T) {
	t.Parallel()
	key := Key{AccessKeyID: "AKIA", SecretAccessKey: "secret", SessionToken: "session", Principal: "arn:aws:iam::1:user/u"}
	header := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	with := func(edit func(*Key)) Key {
		k := key
		edit(&k)
		return k
	}
	for name, test := range map[string]struct {
		key   Key
		late  time.Duration
		edits []func(*http.Request)
		code  string
	}{
		"a good one":                      {key: key},
		"a good one, four minutes old":    {key: key, late: 4 * time.Minute},
		"another secret":                  {key: with(func(k *Key) { k.SecretAccessKey = "x" }), code: "InvalidSignatureException"},
		"another key":                     {key: with(func(k *Key) { k.AccessKeyID = "x" }), code: "UnrecognizedClientException"},
		"another session":                 {key: with(func(k *Key) { k.SessionToken = "x" }), code: "UnrecognizedClientException"},
		"no session":                      {key: with(func(k *Key) { k.SessionToken = "" }), code: "UnrecognizedClientException"},
		"six minutes old":                 {key: key, late: 6 * time.Minute, code: "InvalidSignatureException"},
		"six minutes early":               {key: key, late: -6 * time.Minute, code: "InvalidSignatureException"},
		"another body":                    {key: key, edits: []func(*http.Request){func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader("[]")) }}, code: "InvalidSignatureException"},
		"another time":                    {key: key, edits: []func(*http.Request){header("X-Amz-Date", time.Now().UTC().Add(time.Minute).Format("20060102T150405Z"))}, code: "InvalidSignatureException"},
		"another operation":               {key: key, edits: []func(*http.Request){header("X-Amz-Target", "Other.Operation")}, code: "InvalidSignatureException"},
		"another host":                    {key: key, edits: []func(*http.Request){func(r *http.Request) { r.Host = "evil.test" }}, code: "InvalidSignatureException"},
		"no signature":                    {key: key, edits: []func(*http.Request){func(r *http.Request) { r.Header.Del("Authorization") }}, code: "MissingAuthenticationTokenException"},
		"a signature that cannot be read": {key: key, edits: []func(*http.Request){header("Authorization", "AWS4-HMAC-SHA256 x")}, code: "MissingAuthenticationTokenException"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := New()
			s.AddKey(key)
			w := httptest.NewRecorder()
			s.ServeHTTP(w, ask(t, test.key, time.Now().Add(-test.late), test.edits...))
			var answer struct {
				Type string `json:"__type"`
				Data []any  `json:"authorizationData"`
			}
			require.NoError(t, json.Unmarshal(w.Body.Bytes(), &answer))
			require.Equal(t, test.code, answer.Type)
			if test.code == "" {
				require.Len(t, answer.Data, 1)
				require.Equal(t, []Call{{Service: "ecr", Action: "GetAuthorizationToken", Region: "eu-central-1", Principal: key.Principal}}, s.Calls())
				require.Empty(t, s.Refused())
				return
			}
			require.Empty(t, s.Grants())
			require.Empty(t, s.Calls())
			require.Len(t, s.Refused(), 1)
		})
	}
}

func TestOnlyGoodTokensOpenARegistry(t *testing.T) {
	t.Parallel()
	now := time.Now()
	s := New()
	s.Clock = func() time.Time { return now }
	s.AddKey(Key{AccessKeyID: "AKIA", SecretAccessKey: "secret"})
	s.ServeHTTP(httptest.NewRecorder(), ask(t, Key{AccessKeyID: "AKIA", SecretAccessKey: "secret"}, now))
	password := s.Grants()[0].Password
	registry := s.Guard("eu-central-1", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
	get := func(user, password string) int {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v2/", nil)
		if user != "" {
			r.SetBasicAuth(user, password)
		}
		w := httptest.NewRecorder()
		registry.ServeHTTP(w, r)
		return w.Code
	}
	require.Equal(t, http.StatusTeapot, get("AWS", password))
	require.Equal(t, http.StatusUnauthorized, get("", ""))
	require.Equal(t, http.StatusUnauthorized, get("AWS", "x"))
	require.Equal(t, http.StatusUnauthorized, get("aws", password))
	require.False(t, s.Opens("us-east-1", false, "AWS", password))
	require.False(t, s.Opens("eu-central-1", true, "AWS", password))
	now = now.Add(12 * time.Hour)
	require.Equal(t, http.StatusUnauthorized, get("AWS", password))
	now = now.Add(-time.Hour)
	require.Equal(t, http.StatusTeapot, get("AWS", password))
	s.Revoke(password)
	require.Equal(t, http.StatusUnauthorized, get("AWS", password))
}

func TestWebIdentityIsNotSigned(t *testing.T) {
	t.Parallel()
	s := New()
	s.AddRole(Role{ARN: "arn:aws:iam::1:role/r"})
	post := func(form url.Values) *httptest.ResponseRecorder {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", strings.NewReader(form.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		return w
	}
	form := url.Values{"Action": {"AssumeRoleWithWebIdentity"}, "RoleArn": {"arn:aws:iam::1:role/r"}, "RoleSessionName": {"n"}, "WebIdentityToken": {"jwt"}}
	require.Contains(t, post(form).Body.String(), "<Arn>arn:aws:sts::1:assumed-role/r/n</Arn>")
	form.Del("WebIdentityToken")
	w := post(form)
	require.Equal(t, http.StatusForbidden, w.Code)
	require.Contains(t, w.Body.String(), "<Code>AccessDenied</Code>")
}
