package dockerconfig

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNormalizeIsTheKubelets(t *testing.T) {
	t.Parallel()
	tests := map[string]struct{ key, want string }{
		"a host":                                  {"quay.io", "quay.io"},
		"https goes":                              {"https://quay.io", "quay.io"},
		"http goes":                               {"http://quay.io", "quay.io"},
		"a lone slash goes":                       {"quay.io/", "quay.io"},
		"docker login's key":                      {"https://index.docker.io/v1/", "index.docker.io"},
		"v2 goes as v1 does":                      {"https://quay.io/v2/", "quay.io"},
		"a path after v1 stays":                   {"https://quay.io/v1/acme", "quay.io/acme"},
		"v1 in the middle stays":                  {"quay.io/acme/v1/", "quay.io/acme/v1/"},
		"v1 without a slash after it stays":       {"https://index.docker.io/v1", "index.docker.io/v1"},
		"v1 goes only once":                       {"quay.io/v1/v2/x", "quay.io/v2/x"},
		"a path and its trailing slash stay":      {"quay.io/acme/", "quay.io/acme/"},
		"a port stays":                            {"https://quay.io:443", "quay.io:443"},
		"upper case stays":                        {"Quay.IO/Acme", "Quay.IO/Acme"},
		"globs stay":                              {"*.dkr.ecr.*.amazonaws.com", "*.dkr.ecr.*.amazonaws.com"},
		"docker.io stays":                         {"docker.io", "docker.io"},
		"an IPv6 address":                         {"https://[::1]:5000/x", "[::1]:5000/x"},
		"user information goes":                   {"https://user:pass@quay.io/x", "quay.io/x"},
		"a query and a fragment go":               {"quay.io/x?y=z#f", "quay.io/x"},
		"escapes are decoded once here":           {"quay.io/a%2541", "quay.io/a%41"},
		"an upper-case scheme is taken as a host": {"HTTPS://quay.io", "HTTPS://quay.io"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Normalize(test.key)
			require.NoError(t, err)
			require.Equal(t, test.want, got)
		})
	}
}

func TestNormalizeRefusesWhatMatchesNothing(t *testing.T) {
	t.Parallel()
	for key, printed := range map[string]string{
		"":                          "",
		"https://":                  "https://",
		"/path":                     "/path",
		"a b":                       "a b",
		"r.io:port":                 "r.io:port",
		"r.io/%zz":                  "r.io/%zz",
		"r.io/100%25":               "r.io/100%25",
		"u:" + canary + "/x@r.io":   "r.io",
		"u:" + canary + "@":         "",
		"https://u:" + canary + "@": "",
		"[::1":                      "[::1",
		"r[0-9].io":                 "r[0-9].io",
		"a\nb":                      `a\nb`,
	} {
		_, err := Normalize(key)
		require.ErrorIs(t, err, ErrRegistry, key)
		require.EqualError(t, err, `not a registry: "`+printed+`"`)
	}
}

func TestMatchFindsWhatAKubeletFinds(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		keys  []string
		image string
		want  []string
	}{
		"a host matches its images":                  {[]string{"bar.example.com"}, "bar.example.com/ping:1", []string{"bar.example.com"}},
		"another host does not":                      {[]string{"bar.example.com"}, "foo.example.com/ping", nil},
		"nor does the parent domain":                 {[]string{"bar.example.com"}, "example.com/ping", nil},
		"nor the child domain":                       {[]string{"example.com"}, "bar.example.com/ping", nil},
		"a path matches its own repository":          {[]string{"bar.example.com/pong"}, "bar.example.com/pong", []string{"bar.example.com/pong"}},
		"a path matches below it":                    {[]string{"bar.example.com/pong"}, "bar.example.com/pong/pang", []string{"bar.example.com/pong"}},
		"a path is a plain prefix":                   {[]string{"bar.example.com/pong"}, "bar.example.com/pongz", []string{"bar.example.com/pong"}},
		"a path with a slash is no prefix of itself": {[]string{"bar.example.com/pong/"}, "bar.example.com/pong", nil},
		"another path does not match":                {[]string{"bar.example.com/pong"}, "bar.example.com/ping", nil},
		"the longest path comes first": {
			[]string{"bar.example.com", "bar.example.com/pong", "bar.example.com/pong/pang"}, "bar.example.com/pong/pang",
			[]string{"bar.example.com/pong/pang", "bar.example.com/pong", "bar.example.com"},
		},
		"a literal comes before a glob": {[]string{"*.example.com", "bar.example.com"}, "bar.example.com/x", []string{"bar.example.com", "*.example.com"}},
		"but a glob with a path does not come before a literal without": {
			[]string{"*.example.com/x", "bar.example.com"}, "bar.example.com/x", []string{"bar.example.com", "*.example.com/x"},
		},
		"spellings of one registry all match, sorted": {
			[]string{"quay.io", "https://quay.io/v1/", "http://quay.io"}, "quay.io/x", []string{"http://quay.io", "https://quay.io/v1/", "quay.io"},
		},
		"a key with scheme and v1":            {[]string{"https://quay.io/v1/"}, "quay.io/foo/bar", []string{"https://quay.io/v1/"}},
		"a key with scheme and v2":            {[]string{"https://quay.io/v2/"}, "quay.io/foo", []string{"https://quay.io/v2/"}},
		"v1 without a slash after it is lost": {[]string{"https://index.docker.io/v1"}, "nginx", nil},

		"a glob for the first label":                      {[]string{"*.kubernetes.io"}, "prefix.kubernetes.io/x", []string{"*.kubernetes.io"}},
		"a glob for a middle label":                       {[]string{"prefix.*.io"}, "prefix.kubernetes.io/x", []string{"prefix.*.io"}},
		"a glob for the last label":                       {[]string{"prefix.kubernetes.*"}, "prefix.kubernetes.io/x", []string{"prefix.kubernetes.*"}},
		"a glob for part of a label":                      {[]string{"*-good.kubernetes.io"}, "prefix-good.kubernetes.io/x", []string{"*-good.kubernetes.io"}},
		"a glob of three labels":                          {[]string{"*.*.*.kubernetes.io"}, "a.b.c.kubernetes.io/x", []string{"*.*.*.kubernetes.io"}},
		"a glob for ECR":                                  {[]string{"*.dkr.ecr.*.amazonaws.com"}, "123456789012.dkr.ecr.eu-central-1.amazonaws.com/a/b@sha256:" + strings.Repeat("a", 64), []string{"*.dkr.ecr.*.amazonaws.com"}},
		"a glob spans no dot":                             {[]string{"*.io"}, "a.kubernetes.io/x", nil},
		"a glob needs its label":                          {[]string{"*.kubernetes.io"}, "kubernetes.io/x", nil},
		"a glob without a dot is one label":               {[]string{"*kubernetes.io"}, "a.kubernetes.io/x", nil},
		"and matches an empty rest":                       {[]string{"*kubernetes.io"}, "kubernetes.io/x", []string{"*kubernetes.io"}},
		"a glob that does not fit":                        {[]string{"k*.io"}, "quay.io/x", nil},
		"a question mark begins a query, not a glob":      {[]string{"r?.io"}, "r1.io/x", nil},
		"a glob with a path":                              {[]string{"prefix.*.io/foo"}, "prefix.kubernetes.io/foo/bar", []string{"prefix.*.io/foo"}},
		"no globs in paths":                               {[]string{"r.io/*"}, "r.io/x", nil},
		"a glob with port and path":                       {[]string{"*.kubernetes.io:1111/blah"}, "prefix.kubernetes.io:1111/blah", []string{"*.kubernetes.io:1111/blah"}},
		"another port":                                    {[]string{"*.kubernetes.io:1234/blah"}, "prefix.kubernetes.io:1111/blah", nil},
		"a port in the image alone":                       {[]string{"prefix.kubernetes.io"}, "prefix.kubernetes.io:1111/blah", nil},
		"a port in the key alone":                         {[]string{"quay.io:443"}, "quay.io/x", nil},
		"a host without dot has a port":                   {[]string{"localhost:5000"}, "localhost:5000/x:1", []string{"localhost:5000"}},
		"an IPv6 host":                                    {[]string{"[::1]:5000"}, "[::1]:5000/x", []string{"[::1]:5000"}},
		"an IPv6 host without a port is taken for a glob": {[]string{"[::1]"}, "[::1]/x", nil},
		"an IPv6 host that is no URL":                     {[]string{"r.io"}, "[:::::]/x", nil},
		"case counts":                                     {[]string{"Quay.io"}, "quay.io/x", nil},
		"a host of images may have upper case":            {[]string{"Quay.io"}, "Quay.io/x", []string{"Quay.io"}},

		"Docker Hub for a bare name":                         {[]string{"https://index.docker.io/v1/"}, "nginx", []string{"https://index.docker.io/v1/"}},
		"Docker Hub for a bare name with a tag":              {[]string{"https://index.docker.io/v1/"}, "jenkins:lts", []string{"https://index.docker.io/v1/"}},
		"Docker Hub for a user's image":                      {[]string{"https://index.docker.io/v1/"}, "google/docker-registry", []string{"https://index.docker.io/v1/"}},
		"Docker Hub's name in the image":                     {[]string{"index.docker.io"}, "docker.io/acme/app", []string{"index.docker.io"}},
		"Docker Hub's index in the image":                    {[]string{"index.docker.io"}, "index.docker.io/acme/app", []string{"index.docker.io"}},
		"Docker Hub's name as key":                           {[]string{"docker.io"}, "nginx", []string{"docker.io"}},
		"Docker Hub's name as key for its index":             {[]string{"docker.io"}, "index.docker.io/nginx", []string{"docker.io"}},
		"library is part of the name":                        {[]string{"docker.io/library"}, "nginx", []string{"docker.io/library"}},
		"Docker Hub's name hides its index":                  {[]string{"docker.io", "index.docker.io"}, "nginx", []string{"docker.io"}},
		"a glob hides Docker Hub's index":                    {[]string{"*.io", "index.docker.io"}, "nginx", []string{"*.io"}},
		"a path hides Docker Hub's index":                    {[]string{"docker.io/acme", "index.docker.io"}, "acme/app", []string{"docker.io/acme"}},
		"a path elsewhere does not":                          {[]string{"docker.io/acme", "index.docker.io"}, "other/app", []string{"index.docker.io"}},
		"all spellings of Docker Hub's index":                {[]string{"index.docker.io", "https://index.docker.io/v1/"}, "nginx", []string{"https://index.docker.io/v1/", "index.docker.io"}},
		"a path below Docker Hub's index serves nothing":     {[]string{"https://index.docker.io/v1/acme"}, "index.docker.io/acme/app", nil},
		"a glob for Docker Hub's index serves nothing":       {[]string{"*.docker.io"}, "nginx", nil},
		"Docker Hub's credentials stay at home":              {[]string{"https://index.docker.io/v1/"}, "world.mesos.org/foo/bar", nil},
		"also from a host with a port":                       {[]string{"https://index.docker.io/v1/"}, "registry:5000/foo/bar", nil},
		"but a kubelet sends them to localhost":              {[]string{"https://index.docker.io/v1/"}, "localhost/app", []string{"https://index.docker.io/v1/"}},
		"and to an upper-case host without a dot":            {[]string{"https://index.docker.io/v1/"}, "REGISTRY/app", []string{"https://index.docker.io/v1/"}},
		"a key for localhost":                                {[]string{"localhost", "index.docker.io"}, "localhost/app", []string{"localhost"}},
		"a name that looks like a host without a slash":      {[]string{"quay.io", "index.docker.io"}, "quay.io", []string{"index.docker.io"}},
		"a host with an underscore is no domain but matches": {[]string{"foo_bar.com"}, "foo_bar.com/baz", []string{"foo_bar.com"}},
		"an empty config":                                    {nil, "nginx", nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var all []Entry
			for _, key := range test.keys {
				all = append(all, want{key: key, username: "u"}.entry())
			}
			config, err := New(all...)
			require.NoError(t, err)
			found, err := config.Match(test.image)
			require.NoError(t, err)
			var keys []string
			for _, e := range found {
				keys = append(keys, e.Key.Reveal())
			}
			require.Equal(t, test.want, keys)
		})
	}
}

func TestRepositoryIsTheKubelets(t *testing.T) {
	t.Parallel()
	sha := strings.Repeat("0123456789abcdef", 4)
	for image, want := range map[string]string{
		"nginx":                            "docker.io/library/nginx",
		"nginx:1.27":                       "docker.io/library/nginx",
		"nginx@sha256:" + sha:              "docker.io/library/nginx",
		"nginx:1@sha256:" + sha:            "docker.io/library/nginx",
		"nginx@sha512:" + sha + sha:        "docker.io/library/nginx",
		"library/nginx":                    "docker.io/library/nginx",
		"acme/app":                         "docker.io/acme/app",
		"docker.io/nginx":                  "docker.io/library/nginx",
		"index.docker.io/nginx":            "docker.io/library/nginx",
		"registry-1.docker.io/x":           "registry-1.docker.io/x",
		"localhost/app":                    "localhost/app",
		"localhost:5000/app:1":             "localhost:5000/app",
		"localhost":                        "docker.io/library/localhost",
		"registry:5000":                    "docker.io/library/registry",
		"quay.io/a/b/c:v1":                 "quay.io/a/b/c",
		"HOST/app":                         "HOST/app",
		"foo_bar.com/baz":                  "foo_bar.com/baz",
		"[2001:db8::1]:5000/app":           "[2001:db8::1]:5000/app",
		"r.io/a__b-c---d.e_f":              "r.io/a__b-c---d.e_f",
		"r.io/" + strings.Repeat("a", 255): "r.io/" + strings.Repeat("a", 255),
		sha + ":1":                         "docker.io/library/" + sha,
		sha[1:]:                            "docker.io/library/" + sha[1:],
	} {
		got, err := Repository(image)
		require.NoError(t, err, image)
		require.Equal(t, want, got)
	}
}

func TestImagesThatAKubeletRefusesAreErrors(t *testing.T) {
	t.Parallel()
	sha := strings.Repeat("0123456789abcdef", 4)
	for _, image := range []string{
		"", " ", "nginx ", "nginx\n", "Nginx", "r.io/App", "r.io/", "/app", "r.io//app", "-r.io/app", "r.io/-app", "r.io/a...b", "a:b:c",
		"nginx:", "nginx:" + strings.Repeat("a", 129), "nginx@", "nginx@sha256:abc", "nginx@sha256:" + strings.ToUpper(sha),
		"nginx@md5:" + sha[:32], "nginx@sha256:" + sha + ":1", sha, "https://r.io/app", "u:p@r.io/app", "r.io:port/app",
		"r.io/" + strings.Repeat("a", 256), "nginx:é", "[::1/app",
	} {
		_, err := Repository(image)
		require.ErrorIs(t, err, ErrImage, image)
		require.Less(t, len(err.Error()), 200)
		found, err := mustParse(t, `"r.io":{"username":"u"},"index.docker.io":{"username":"u"}`).Match(image)
		require.ErrorIs(t, err, ErrImage, image)
		require.Empty(t, found)
	}
}
