package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/pkg/nodecache"
)

// canary stands for a credential. No test may find it where things are printed.
const canary = "canary-8c31f7-never-printed"

type password string

func (p password) Reveal() string { return string(p) }

// cache returns a folder with records of the node and of the namespaces a, b and c, of which c has nothing.
func cache(t *testing.T) (dir string, writer *nodecache.Writer) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "imps")
	w, err := nodecache.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { _ = w.Close() })
	entry := func(secret string, lasts time.Duration) []nodecache.Entry {
		e := nodecache.Entry{Key: "r.one", Username: password("u"), Password: password(secret)}
		if lasts != 0 {
			e.Expires = time.Now().Add(lasts)
		}
		return []nodecache.Entry{e}
	}
	expiring := entry("for a team, for a moment", 3*time.Second)[0]
	expiring.Key += "/team"
	set(t, w, nodecache.Node, append(entry("of the node", 0), nodecache.Entry{Key: "r.two/team", Username: password("u"), Password: password("2")}))
	set(t, w, nodecache.InNamespace("a"), entry("of a", 3*time.Minute))
	set(t, w, nodecache.InNamespace("b"), entry("of b", margin))
	set(t, w, nodecache.InNamespace("c"), nil)
	set(t, w, nodecache.InNamespace("d"), append(entry("of d", 0), expiring))
	return dir, w
}

// set has a scope of a node cache hold entries, all of them.
func set(t testing.TB, w *nodecache.Writer, scope nodecache.Scope, entries []nodecache.Entry) {
	t.Helper()
	skipped, err := w.Set(scope, entries)
	require.NoError(t, err)
	require.Zero(t, skipped)
}

// ask runs the provider for a request.
func ask(t *testing.T, request string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = run(args, strings.NewReader(request), &out, &errOut)
	require.NotContains(t, errOut.String(), canary)
	return code, out.String(), errOut.String()
}

// asks is a request as kubelets send it.
func asks(image, token string) string {
	r := map[string]any{"kind": kindRequest, "apiVersion": apiVersion, "image": image, "serviceAccountAnnotations": map[string]string{"x": "y"}}
	if token != "" {
		r["serviceAccountToken"] = token
	}
	raw, err := json.Marshal(r)
	if err != nil {
		panic(err)
	}
	return string(raw)
}

// tokenOf is a token with these claims, where those of a Pod in the namespace a are changed by pairs of old and new text.
func tokenOf(changes ...string) string {
	payload := fmt.Sprintf(`{"aud":["imps"],"exp":%d,"iss":"https://kubernetes.default.svc","kubernetes.io":{"namespace":"a","node":{"name":"n"},`+
		`"pod":{"name":"p","uid":"1"},"serviceaccount":{"name":"default","uid":"2"}},"sub":"system:serviceaccount:a:default"}`, time.Now().Add(time.Hour).Unix())
	for i := 0; i < len(changes); i += 2 {
		if !strings.Contains(payload, changes[i]) {
			panic(changes[i])
		}
		payload = strings.Replace(payload, changes[i], changes[i+1], 1)
	}
	return "eyJhbGciOiJSUzI1NiJ9." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".c2lnbmVk"
}

// tokenFor is that of a Pod in another namespace.
func tokenFor(namespace string) string {
	return tokenOf(`"namespace":"a"`, `"namespace":"`+namespace+`"`, "account:a:", "account:"+namespace+":")
}

const miss = `{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderResponse","cacheKeyType":"Image","cacheDuration":"0s","auth":{}}`

func TestAnswers(t *testing.T) {
	t.Parallel()
	dir, _ := cache(t)
	hit := func(auth string) string {
		return `{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderResponse","cacheKeyType":"Registry","cacheDuration":"5m0s","auth":{` + auth + `}}`
	}
	ofA := tokenOf()
	const badQuestion = "the image names no registry, or the token no namespace"
	const badToken = "the token is not one of a ServiceAccount for the audience, or has expired"
	tests := map[string]struct{ request, want, doubt string }{
		"of the node": {asks("r.one/app", ""), hit(`"r.one":{"username":"u","password":"of the node"}`), ""},
		"what is for some repositories of a registry":      {asks("r.two/team/app", ""), hit(`"r.two/team":{"username":"u","password":"2"}`), ""},
		"nothing but what is for other repositories of it": {asks("r.two/other", ""), miss, ""},
		"short, where something is about to be replaced":   {asks("r.one/team/app", tokenFor("d")), strings.NewReplacer("Registry", "Image", "5m0s", "1s").Replace(hit(`"r.one":{"username":"u","password":"of d"}`)), ""},
		"nothing":                                  {asks("r.three/app", ""), miss, ""},
		"no registry":                              {asks("app", ""), miss, badQuestion},
		"of a namespace that has nothing":          {asks("r.one/app", tokenFor("c")), miss, ""},
		"of a namespace, for what the node has":    {asks("r.two/team", ofA), miss, ""},
		"of a namespace whose token expires soon":  {asks("r.one/app", tokenFor("b")), miss, ""},
		"with a token for another audience":        {asks("r.one/app", tokenOf(`["imps"]`, `["https://kubernetes.default.svc"]`)), miss, badToken},
		"with a token for none":                    {asks("r.one/app", tokenOf(`["imps"]`, `[]`)), miss, badToken},
		"with a token that names another subject":  {asks("r.one/app", tokenOf("account:a:", "account:b:")), miss, badToken},
		"with a token of no ServiceAccount":        {asks("r.one/app", tokenOf(`"name":"default"`, `"name":""`, "a:default", "a:")), miss, badToken},
		"with a token without a namespace":         {asks("r.one/app", tokenOf(`"namespace":"a"`, `"namespace":""`, "account:a:", "account::")), miss, badToken},
		"with a token of a namespace that is none": {asks("r.one/app", tokenOf(`"namespace":"a"`, `"namespace":"../node"`, "account:a:", "account:../node:")), miss, badQuestion},
		"with a token that has expired":            {asks("r.one/app", tokenOf(`"exp":1`, `"exp":0`)), miss, badToken},
		"with a token that is none":                {asks("r.one/app", "x.y.z"), miss, badToken},
		"with a token in two parts":                {asks("r.one/app", ofA[:strings.LastIndex(ofA, ".")]), miss, badToken},
		"with a token whose claims are no object":  {asks("r.one/app", "e30.W10.e30"), miss, badToken},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := ask(t, test.request, "--cache-dir="+dir)
			require.Zero(t, code)
			require.Equal(t, test.want, stdout)
			if test.doubt == "" {
				require.Empty(t, stderr)
			} else {
				require.Equal(t, "imps-credprovider: no credentials: "+test.doubt+"\n", stderr)
			}
		})
	}
	for name, token := range map[string]string{"a list of audiences": ofA, "one audience": tokenOf(`["imps"]`, `"imps"`), "several audiences": tokenOf(`["imps"]`, `["x","imps"]`)} {
		t.Run("of its namespace, with "+name, func(t *testing.T) {
			_, stdout, _ := ask(t, asks("r.one/app", token), "--cache-dir="+dir)
			var r response
			require.NoError(t, json.Unmarshal([]byte(stdout), &r))
			require.Equal(t, map[string]auth{"r.one": {"u", "of a"}}, r.Auth)
			lasts, err := time.ParseDuration(r.CacheDuration)
			require.NoError(t, err)
			require.Greater(t, lasts, time.Minute, "what remains, but for the margin")
			require.LessOrEqual(t, lasts, 2*time.Minute)
		})
	}
	t.Run("for an audience of the installation's own", func(t *testing.T) {
		_, stdout, _ := ask(t, asks("r.one/app", tokenOf(`["imps"]`, `["pull"]`)), "--cache-dir="+dir, "--token-audience=pull")
		require.Contains(t, stdout, "of a")
		_, stdout, _ = ask(t, asks("r.one/app", ofA), "--cache-dir="+dir, "--token-audience=pull")
		require.Equal(t, miss, stdout)
	})
	t.Run("in an entry for tokens", func(t *testing.T) {
		_, stdout, _ := ask(t, asks("r.one/app", ofA), "--cache-dir="+dir, "--scope=Namespace")
		require.Contains(t, stdout, "of a")
		_, stdout, _ = ask(t, asks("r.one/app", ""), "--cache-dir="+dir, "--scope=Namespace")
		require.Equal(t, miss, stdout, "the node's are not for it")
	})
	t.Run("from a folder that is not there", func(t *testing.T) {
		code, stdout, stderr := ask(t, asks("r.one/app", ""), "--cache-dir="+filepath.Join(dir, "nowhere"))
		require.Zero(t, code)
		require.Equal(t, miss, stdout)
		require.Contains(t, stderr, "has nothing about the namespace, or the node")
	})
	t.Run("from a folder that is open to others", func(t *testing.T) {
		elsewhere, _ := cache(t)
		require.NoError(t, os.Chmod(elsewhere, 0o755))
		code, stdout, stderr := ask(t, asks("r.one/app", ""), "--cache-dir="+elsewhere)
		require.Zero(t, code)
		require.Equal(t, miss, stdout)
		require.Contains(t, stderr, "must be root's alone")
	})
}

// A namespace that the agent has not dealt with yet is waited for, as long as there is an agent.
func TestANamespaceThatIsNotKnownYet(t *testing.T) {
	t.Parallel()
	dir, w := cache(t)
	// Written elsewhere, so that it is there at once.
	elsewhere, other := cache(t)
	set(t, other, nodecache.InNamespace("new"), []nodecache.Entry{{Key: "r.one", Username: password("u"), Password: password("of new")}})
	of := func(namespace string) request {
		return request{Image: "r.one/app", ServiceAccountToken: tokenFor(namespace)}
	}
	patient := options{cacheDir: dir, audience: "imps", scope: scopeNode, patience: time.Hour}
	lookup := func(o options, r request) response {
		found, _ := o.lookup(r, time.Now())
		return found
	}
	answer := make(chan response, 1)
	go func() { answer <- lookup(patient, of("new")) }()
	select {
	case early := <-answer:
		require.Fail(t, "it does not wait", "%v", early.Auth)
	case <-time.After(100 * time.Millisecond): // it has looked once, in all likelihood
	}
	require.NoError(t, os.Rename(filepath.Join(elsewhere, "ns-new"), filepath.Join(dir, "ns-new")))
	require.Equal(t, map[string]auth{"r.one": {"u", "of new"}}, (<-answer).Auth)

	impatient := patient
	impatient.patience = 3 * pauseLongest
	began := time.Now()
	require.Empty(t, lookup(impatient, of("unknown")).Auth)
	require.GreaterOrEqual(t, time.Since(began), impatient.patience)
	// These would take an hour, were they waited for.
	require.Empty(t, lookup(patient, of("c")).Auth, "it is known to have nothing")
	require.NoError(t, w.Remove(nodecache.Node))
	require.Empty(t, lookup(patient, request{Image: "r.one/app"}).Auth, "not for the node")
	require.NoError(t, w.Close())
	require.Empty(t, lookup(patient, of("unknown")).Auth, "nobody would write it")

	o, err := parse(nil, io.Discard)
	require.NoError(t, err)
	require.Equal(t, 500*time.Millisecond, o.patience)
}

// Whatever it hangs at, it ends.
func TestTheHardStop(t *testing.T) {
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "provider")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	ctx, cancel := context.WithTimeout(t.Context(), 10*hardStop)
	defer cancel()
	command := exec.CommandContext(ctx, binary)
	stdin, err := command.StdinPipe() // which says nothing, and does not end
	require.NoError(t, err)
	defer func() { _ = stdin.Close() }()
	var stderr bytes.Buffer
	command.Stderr = &stderr
	require.Error(t, command.Run())
	require.NoError(t, ctx.Err())
	require.Equal(t, 1, command.ProcessState.ExitCode())
	require.Equal(t, "imps-credprovider: no answer within 2 s\n", stderr.String())
}

func TestWhatIsNoRequest(t *testing.T) {
	t.Parallel()
	dir, _ := cache(t)
	good := asks("r.one/app", canary)
	for name, c := range map[string]struct{ request, want string }{
		"nothing":           {"", "no JSON"},
		"no JSON":           {"GET / " + canary, "no JSON"},
		"no object":         {"[]", "no JSON"},
		"two objects":       {good + good, "no JSON"},
		"another kind":      {strings.Replace(good, kindRequest, canary, 1), "not of kind CredentialProviderRequest"},
		"another version":   {strings.Replace(good, apiVersion, "credentialprovider.kubelet.k8s.io/v2", 1), "not of kind CredentialProviderRequest"},
		"no image":          {asks("", canary), "names no image"},
		"more than a bit":   {good + strings.Repeat(" ", maxRequestBytes), "too large"},
		"an image of a map": {strings.Replace(good, `"r.one/app"`, `{"`+canary+`":1}`, 1), "no JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := ask(t, c.request, "--cache-dir="+dir)
			require.Equal(t, 1, code)
			require.Empty(t, stdout)
			require.Regexp(t, `^imps-credprovider: [^\n]*`+c.want+`[^\n]*\n$`, stderr)
		})
	}
	for _, args := range [][]string{{"--" + canary}, {"get-credentials"}, {"--cache-dir="}, {"--token-audience="}, {"--scope=" + canary}} {
		code, stdout, stderr := ask(t, asks("r.one/app", ""), args...)
		require.Equal(t, 1, code)
		require.Empty(t, stdout)
		require.Equal(t, 1, strings.Count(stderr, "\n"))
	}
}

func TestVersionAndHelp(t *testing.T) {
	t.Parallel()
	code, stdout, stderr := ask(t, "", "--version")
	require.Zero(t, code)
	require.Empty(t, stderr)
	require.Regexp(t, `^imps-credprovider dev, go1\.\S+, \w+/\w+\n$`, stdout)
	code, stdout, stderr = ask(t, "", "--help")
	require.Zero(t, code)
	require.Empty(t, stdout)
	require.Contains(t, stderr, "-cache-dir folder")
}

// What the kubelet starts for a pull is the standard library and the node cache, and nothing else.
func TestDependencies(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	require.NoError(t, err)
	require.Equal(t, []string{"github.com/imps-node/imps/pkg/nodecache", "github.com/imps-node/imps/cmd/imps-credprovider"}, strings.Fields(string(out)))
	out, err = exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	require.NoError(t, err)
	for dependency := range strings.FieldsSeq(string(out)) {
		require.NotContains(t, []string{"net", "net/http", "os/exec", "crypto/tls"}, dependency)
	}
}

// Whatever is asked, the answer is an answer or an error, and never a credential on stderr.
func FuzzRun(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "imps")
	w, err := nodecache.Open(dir)
	require.NoError(f, err)
	set(f, w, nodecache.Node, []nodecache.Entry{{Key: "r.one", Username: password("u"), Password: password(canary)}})
	require.NoError(f, w.Close())
	f.Add([]byte(asks("r.one/app", "")))
	f.Add([]byte(asks("r.one/app", tokenOf())))
	f.Fuzz(func(t *testing.T, request []byte) {
		var out, errOut bytes.Buffer
		code := run([]string{"--cache-dir=" + dir}, bytes.NewReader(request), &out, &errOut)
		require.NotContains(t, errOut.String(), canary)
		if code != 0 {
			require.Empty(t, out.String())
			return
		}
		var r response
		decoder := json.NewDecoder(&out)
		decoder.DisallowUnknownFields()
		require.NoError(t, decoder.Decode(&r))
		lasts, err := time.ParseDuration(r.CacheDuration)
		require.NoError(t, err)
		require.Equal(t, len(r.Auth) > 0, lasts > 0)
	})
}
